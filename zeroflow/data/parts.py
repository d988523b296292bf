"""Building one part of a shard set: tokenise a slice of the corpus, pack it, and write the files.

A part depends on its slice and the settings, and on other parts only if duplicates are left out.
So parts can be built in any order by any number of processes, and a killed build loses only the
parts in progress.
"""

import errno
import logging
import os
import time
from pathlib import Path

from zeroflow import artifacts
from zeroflow.artifacts import FileRecord
from zeroflow.data.document_table import DocumentTable
from zeroflow.data.documents import Tally
from zeroflow.data.duplicates import SeenTexts
from zeroflow.data.file_writer import FileWriter
from zeroflow.data.part_job import BuiltPart, PartJob
from zeroflow.data.returned_text import MOST_LOST, WORTH_A_WARNING, ReturnedText
from zeroflow.data.shards import SPLITS, PartFacts, PartManifest, Split, part_path
from zeroflow.data.split_writer import SplitWriter
from zeroflow.data.tokenizing import tokenize

log = logging.getLogger(__name__)


def existing_part(path: Path) -> PartFacts | None:
    """Return the facts of a part that exists and verifies; otherwise None."""
    if not path.exists():
        return None
    try:
        return PartManifest.model_validate(artifacts.verify(path)).facts
    except artifacts.DamagedArtifact:
        return None  # `build_part` sets it aside, under the lock


def build_part(job: PartJob) -> BuiltPart:
    """Ensure that the part exists and verifies.

    Raises:
        ValueError: the content of the corpus, or of the tokenizer, is not valid.
        hub.HubError: the hub failed.
        OSError: for example, the disk is full.
    """
    start = time.perf_counter()

    def write(partial: Path) -> None:
        manifest, records = _write(partial, job)
        artifacts.seal(partial, manifest.model_dump(mode="json", exclude_none=True), records)

    try:
        if job.claim:
            reused = artifacts.build_first(job.path, write, mark=job.claim)
        else:
            reused = artifacts.build_once(job.path, write)
    except OSError as error:
        if error.errno in artifacts.NO_ROOM:
            raise OSError(
                errno.ENOSPC,
                f"no space is left in {job.path.parent} for another part "
                f"({os.strerror(error.errno)}): free some space, or set another --cache-dir. "
                "Complete parts are kept",
            ) from error
        raise
    facts = PartManifest.read(job.path).facts
    built = BuiltPart(facts=facts, seconds=0.0 if reused else time.perf_counter() - start)
    log_part(job, built)
    return built


def log_part(job: PartJob, built: BuiltPart) -> None:
    """Log the tokens and seconds of a part that was built here or on a worker."""
    if not built.seconds:
        return  # the part existed already
    tokens = built.facts.train.document_tokens + built.facts.validation.document_tokens
    log.info("%s: %s tokens in %.1f s", job.path.name, f"{tokens:,}", built.seconds)
    returned = PartManifest.read(job.path).returned
    if returned and job.path == part_path(job.path.parent, 0):
        _warn_of_loss(returned, job.tokenizer.name)


def _warn_of_loss(returned: ReturnedText, tokenizer: str) -> None:
    """Warn about lost text after the first part, long before the pre-flight check of it."""
    if (share := returned.lost_share) >= WORTH_A_WARNING:
        log.warning(
            "%.1f%% of the characters are lost by encoding and decoding with %s, in a sample of %s "
            "characters of the first part; the pre-flight fails at %.0f%%",
            100 * share,
            tokenizer,
            f"{returned.characters:,}",
            100 * MOST_LOST,
        )


def _write(folder: Path, job: PartJob) -> tuple[PartManifest, dict[str, FileRecord]]:
    """Write the part's files; return its manifest, and the entries of the files with rows."""
    tally, duplicates, held_out_ends = Tally(), 0, 0
    seen = SeenTexts(job.earlier) if job.corpus.is_text and job.corpus.deduplicate else None
    with FileWriter() as writer, DocumentTable.create(folder) as table:
        splits: dict[Split, SplitWriter] = {
            split: SplitWriter(
                folder,
                split,
                job.layout,
                end_of_text=job.tokenizer.end_of_text,
                table=table,
                writer=writer,
            )
            for split in SPLITS
        }
        for batch in tokenize(job, tally):
            if seen:
                new = seen.add(batch.documents.hashes)
                duplicates += int((~new & ~batch.documents.ends).sum())
                batch = batch.choose(new)
            held_out = batch.documents.held_out
            held_out_ends += int(batch.documents.ends.sum())
            splits["train"].add(batch.choose(~held_out))
            # A copy, because these few documents wait long for a full window, and a view would keep
            # the whole batch in memory
            splits["validation"].add(batch.choose(held_out).copy())
        facts = PartFacts(
            train=splits["train"].finish(),
            validation=splits["validation"].finish(),
            empty_documents=tally.empty,
            duplicates=duplicates,
            bad_lines=tally.bad_lines,
            bad_places=tuple(tally.bad_places),
            held_out_ends=held_out_ends,
        )
    return PartManifest(facts=facts, returned=tally.returned), writer.records()
