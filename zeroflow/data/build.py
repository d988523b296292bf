"""Rows of tokens on disk: a set of parts that grows, and its memory-mapped reader.

A shard set is a directory `<cache>/shards/<name>-<fingerprint>/` with

    plan.json        settings and source, the corpus's files, and the slices that parts are made of
    part-00000/ ...  a part for each slice, complete or absent:
        train-00000.arrow ...       rows to train on
        validation-00000.arrow ...  rows of documents of which no training row holds a token
        documents.parquet           where each document lies
        manifest.json               counts, and size and sha256 of every file

Each Arrow file is one record batch with one column `tokens`, a non-null, uncompressed
`FixedSizeList` of `row_tokens` ids: plain pyarrow maps it into memory and reads any row at once.
Every document is closed by the end-of-text id, which stands nowhere else but as padding behind
another one. documents.parquet has a line for each piece of a document, in order: id, url, split,
row of that split in the part, offset in the row, start in the document, tokens of the piece, UTF-8
bytes of the whole document, and a hash of its text where duplicates are left out.

A run reads the first parts that hold as many rows as it needs. The fingerprint is of what the bytes
depend on, of which the length of a run is none: a longer run adds parts.
"""

import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt

from zeroflow import artifacts, reuse
from zeroflow.data import parts, slices, synthetic
from zeroflow.data.builders import Builders, Ending, in_threads
from zeroflow.data.corpus import (
    CorpusConfig,
    corpus_identity,
    file_digests,
    list_files,
    plan_slices,
    read_documents,
    split_positions,
)
from zeroflow.data.part_facts import BuiltPart, Layout, PartFacts, PartJob, SplitCounts
from zeroflow.data.shards import (
    BUILDS,
    CHARACTERS_PER_TOKEN,
    PLAN,
    SYNTHETIC_BLOCKS,
    ShardConfig,
    ShardSet,
    part_path,
)
from zeroflow.data.slices import Slice, SourceFile
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.reuse import Fields
from zeroflow.run_folder import Cache

log = logging.getLogger(__name__)


_FORMAT = 3


_FEW_DOCUMENTS = 1000
"""From so many on, the fraction that is held out is left to chance."""


def build_shards(
    config: ShardConfig,
    corpus: CorpusConfig,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    seed: NonNegativeInt = 0,
    builders: Builders | None = None,
    show: Callable[[float, str], None] = lambda share, text: None,
) -> ShardSet:
    """Have the rows that `config` asks for, of the resolved `corpus`, under `<cache>/shards/`.

    Parts that are there are verified and used. A corpus that ends earlier gives the rows it has.

    Args:
        seed: of synthetic data.
        builders: of parts, wherever they are; None is a thread of this process. No more parts are
            built at once than the run is likely to need.
        show: is told the share that is done, from 0 to 1, and a line about it, after each part.

    Raises:
        ValueError: ids do not fit the integer type, or the corpus is too small to hold out a
            document, or holds what it should not.
        hub.HubError: the hub failed.
    """
    highest = np.iinfo(config.token_type).max
    if tokenizer.vocab_size - 1 > highest:
        raise ValueError(
            f"{tokenizer.name} has {tokenizer.vocab_size} tokens, more than {config.token_type} "
            f"holds (ids up to {highest}): use --token-type int32"
        )
    identity = {
        "format": _FORMAT,
        "corpus": _identity(corpus, tokenizer, seed),
        "tokenizer": tokenizer.fingerprint,
        "layout": config.layout.model_dump(),
        "slice_bytes": slices.SLICE_BYTES,
    }
    name = f"{corpus.name}-{config.seq_len}-{artifacts.fingerprint(identity)}"
    path = Cache(cache).shards / name
    plan = _SlicePlan(path, corpus, tokenizer, config, seed, identity)

    with nullcontext(builders) if builders else in_threads(1) as who:
        facts, reasons, built = _build_parts(plan, config, who, show)
    _refuse_bad_lines(facts, corpus)
    shards = _describe(path, facts, tokenizer, config)
    shards = shards.replace(reused=not built, why=_why(len(facts) - built, built, reasons))
    if built:  # a corpus may have ended before
        show(1.0, f"{shards.parts:,} parts, {shards.train.rows:,} rows to train on")
    _tell(shards, config, built)
    return shards


def _build_parts(
    plan: "_SlicePlan",
    config: ShardConfig,
    builders: Builders,
    show: Callable[[float, str], None],
) -> tuple[list[PartFacts], dict[Path, str], int]:
    """The parts that are needed, why some were built, by what was missing, and how many."""
    facts: list[PartFacts] = []
    reasons: dict[Path, str] = {}
    built, begun = 0, time.monotonic()

    def note(missing: Path) -> None:
        if missing not in reasons:
            damaged = missing != plan.path
            reasons[missing] = reuse.damaged(missing) if damaged else plan.lacks(facts, config)
            log.info("shards have to be built: %s", reasons[missing])

    with _waited_for(builders) as under_way:
        while not _enough(facts, config) and (job := plan.job(len(facts))):
            if not under_way:
                missing = job.path if job.path.exists() else plan.path
                if (whole := parts.existing(job.path)) is not None:
                    facts.append(whole)
                    continue
                note(missing)
                if not built:
                    log.info("building shards of %s in %s", plan.corpus.name, plan.path)
                under_way.append((missing, builders.start(job)))
            more = min(builders.at_once, _missing_parts(facts, config)) - len(under_way)
            for following in plan.absent_after(len(facts) + len(under_way) - 1, more):
                under_way.append((plan.path, builders.start(following)))
            missing, ending = under_way.popleft()
            done = ending()
            if isinstance(done, Exception):
                raise done
            note(missing)
            built += 1
            facts.append(done.facts)
            _note_build(plan.path, len(facts) - 1, done)
            _refuse_bad_lines(facts, plan.corpus)
            show(*_progress(facts, built, config, time.monotonic() - begun))
    return facts, reasons, built


@contextmanager
def _waited_for(builders: Builders) -> Iterator[deque[tuple[Path, Ending]]]:
    """Parts that are being built, and what was missing before.

    Those that are not needed in the end are waited for, and may well have failed; an interrupt
    waits for none.
    """
    under_way: deque[tuple[Path, Ending]] = deque()
    try:
        yield under_way
    except Exception:
        _wait(builders, under_way)
        raise
    _wait(builders, under_way)


def _wait(builders: Builders, under_way: deque[tuple[Path, Ending]]) -> None:
    builders.give_up()
    for _, ending in under_way:
        ending()


class _SlicePlan:
    """The slices of the corpus, found out as far as they are needed and kept in plan.json.

    Its content follows from the corpus, so it does not matter which of several processes writes it.
    """

    def __init__(
        self,
        path: Path,
        corpus: CorpusConfig,
        tokenizer: Tokenizer,
        config: ShardConfig,
        seed: int,
        identity: dict[str, Any],
    ) -> None:
        self.path, self.corpus, self._tokenizer = path, corpus, tokenizer
        self._layout, self._seed = config.layout, seed
        self._begun = (path / PLAN).exists()
        known = self._read(identity)
        if known is None:
            known = {
                "identity": identity,
                "tokenizer": tokenizer.name,
                "digests": {} if corpus.data_mode == "synthetic" else file_digests(corpus),
                "held_out_below": _held_out_below(corpus, tokenizer, config.layout),
                "files": [file.model_dump() for file in _files(corpus)],
                "next_file": 0,
                "slices": [],
            }
            artifacts.write_signed(path / PLAN, known)
        self._known = known
        self._files = [SourceFile.model_validate(file) for file in known["files"]]
        self._slices = [Slice.model_validate(piece) for piece in known["slices"]]

    def _read(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """What is known already; None if that is nothing, or not to be trusted."""
        if not (self.path / PLAN).exists():
            return None
        try:
            known = artifacts.read_signed(self.path / PLAN)
        except artifacts.DamagedArtifact as damage:
            log.warning("%s: made anew", damage)
            return None
        return known if known["identity"] == json.loads(json.dumps(identity)) else None

    def job(self, number: int) -> PartJob | None:
        """What part `number` is made of; None if the corpus ends before."""
        if (piece := self._slice(number)) is None:
            return None
        earlier = range(number) if self.corpus.deduplicate else ()
        return PartJob(
            path=part_path(self.path, number),
            piece=piece,
            corpus=self.corpus,
            tokenizer=self._tokenizer,
            layout=self._layout,
            held_out_below=self._known["held_out_below"],
            seed=self._seed,
            earlier=tuple(part_path(self.path, i) for i in earlier),
        )

    def lacks(self, facts: list[PartFacts], config: ShardConfig) -> str:
        """Why there is no part after those with `facts`, although `config` needs one."""
        if facts:
            return _too_few(facts, config)
        if self._begun:
            return f"{self.path.name} was begun before, and its first part is not complete"
        others = reuse.existing(self.path.parent, _recorded, but=self.path)
        return reuse.nearest(_fields(self._known), others)

    def absent_after(self, number: int, most: int) -> Iterator[PartJob]:
        """Jobs of the parts that follow part `number`, up to the first that is there.

        None where duplicates are left out: each part has to know those before it.
        """
        most = 0 if self.corpus.deduplicate else most
        for following in range(number + 1, number + 1 + most):
            job = self.job(following)
            if job is None or job.path.exists():
                return
            yield job

    def _slice(self, number: int) -> Slice | None:
        if self._tokenizer.path is None:
            start = number * SYNTHETIC_BLOCKS
            return Slice(start=start, stop=start + SYNTHETIC_BLOCKS)
        while number >= len(self._slices) and self._known["next_file"] < len(self._files):
            planned = plan_slices(self.corpus, self._files, self._known["next_file"])
            self._slices += planned.slices
            self._known["next_file"] = planned.next_file
            self._known["slices"] = [piece.model_dump() for piece in self._slices]
            artifacts.write_signed(self.path / PLAN, self._known)
        return self._slices[number] if number < len(self._slices) else None


def _files(corpus: CorpusConfig) -> list[SourceFile]:
    return [] if corpus.data_mode == "synthetic" else list_files(corpus)


def _identity(corpus: CorpusConfig, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    if corpus.data_mode == "synthetic":
        return {"source": "synthetic", "seed": seed, "vocab_size": tokenizer.vocab_size}
    return corpus_identity(corpus) | {"deduplicate": corpus.deduplicate}


def _recorded(path: Path) -> Fields:
    return _fields(artifacts.read_signed(path / PLAN))


def _fields(plan: dict[str, Any]) -> Fields:
    """What a set depends on, from its plan, by the names of settings."""
    identity = dict(plan["identity"])
    layout, source = dict(identity.pop("layout")), identity.pop("corpus")
    seq_len = layout.pop("row_tokens") - 1
    local = source["source"] in ("files", "sample")
    files = plan.get("digests") or ("unknown" if local else {})  # of an earlier version
    return {"seq_len": seq_len, **layout, **source, "file": files, **identity}


def _held_out_below(corpus: CorpusConfig, tokenizer: Tokenizer, layout: Layout) -> float:
    """Documents whose place in [0, 1) is lower are held out.

    Of a corpus of a few documents, those with the lowest places are held out even above the
    fraction, until they fill a row or are half of all, and the highest never is.
    """
    limit = layout.validation_fraction
    if tokenizer.path is None:
        return limit
    few: list[tuple[float, int]] = []  # not the texts, which may be books
    seen: set[bytes] = set()
    for document in read_documents(corpus):
        if corpus.deduplicate:
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
        [place] = split_positions([document.id.encode("utf-8", "surrogatepass")]).tolist()
        few.append((place, len(document.text)))
        if len(few) >= _FEW_DOCUMENTS:
            return limit
    few.sort()
    filled = 0.0
    for place, characters in few[: max(1, len(few) // 2)]:
        if filled >= layout.row_tokens:
            break
        filled += characters / CHARACTERS_PER_TOKEN
        limit = max(limit, float(np.nextafter(place, 1)))
    return min(limit, few[-1][0]) if few else limit


def _enough(facts: list[PartFacts], config: ShardConfig) -> bool:
    train = sum(part.train.rows for part in facts)
    validation = sum(part.validation.rows for part in facts)
    return train >= config.train_rows and validation >= config.validation_rows


def _too_few(facts: list[PartFacts], config: ShardConfig) -> str:
    train = sum(part.train.rows for part in facts)
    validation = sum(part.validation.rows for part in facts)
    return (
        f"parts 1 to {len(facts)} have {train:,} of {config.train_rows:,} rows to train on, "
        f"{validation:,} of {config.validation_rows:,} to validate on"
    )


def _why(reused: int, built: int, reasons: dict[Path, str]) -> str:
    if not built:
        return reuse.SAME
    counts = f"{reused} parts reused and {built} built: " if reused else ""
    return counts + "; ".join(reasons.values())


def _missing_parts(facts: list[PartFacts], config: ShardConfig) -> int:
    """How many more are likely to be needed, judged by those that are there."""
    row_bytes = config.layout.row_tokens * CHARACTERS_PER_TOKEN
    rows = slices.SLICE_BYTES / row_bytes  # in a part, as long as there is none
    share = config.validation_fraction
    train, validation = rows * (1 - share), rows * share
    if facts:
        train = sum(part.train.rows for part in facts) / len(facts)
        validation = sum(part.validation.rows for part in facts) / len(facts)
    total = max(
        config.train_rows / max(train, 1), config.validation_rows / max(validation, 1), len(facts)
    )
    return max(1, math.ceil(total) - len(facts))


def _progress(
    facts: list[PartFacts], built: int, config: ShardConfig, seconds: float
) -> tuple[float, str]:
    """The share of the rows that are there, and a line with the time left at the pace so far."""
    train = sum(part.train.rows for part in facts)
    validation = sum(part.validation.rows for part in facts)
    missing = _missing_parts(facts, config) if not _enough(facts, config) else 0
    share = min(1.0, train / config.train_rows, validation / config.validation_rows)
    left = f"  ETA {missing * seconds / built:,.0f} s" if missing else ""
    return share, f"part {len(facts)}  {train:,} of {config.train_rows:,} rows{left}"


def _describe(
    path: Path, facts: list[PartFacts], tokenizer: Tokenizer, config: ShardConfig
) -> ShardSet:
    train = reduce(add, (part.train for part in facts), SplitCounts())
    validation = reduce(add, (part.validation for part in facts), SplitCounts())
    for split, counts in (("train", train), ("validation", validation)):
        if not counts.rows:
            raise ValueError(
                f"the corpus is too small: it has {train.documents + validation.documents} "
                f"documents, and none is left for {split}. Give more documents: whole ones are "
                "held out for validation, by their ids, which have to differ"
            )
    return ShardSet(
        path=path,
        parts=len(facts),
        row_tokens=config.layout.row_tokens,
        end_of_text=tokenizer.end_of_text,
        train=train,
        validation=validation,
        empty_documents=sum(part.empty_documents for part in facts),
        duplicates=sum(part.duplicates for part in facts),
        bad_lines=sum(part.bad_lines for part in facts),
        entropy=synthetic.entropy_rate(tokenizer.vocab_size) if tokenizer.path is None else None,
    )


def _tell(shards: ShardSet, config: ShardConfig, built: int) -> None:
    log.info(
        "shards %s: %s + %s rows of %d tokens from %s documents, parts 1 to %d: %s",
        "reused" if shards.reused else f"built ({built} parts)",
        f"{shards.train.rows:,}",
        f"{shards.validation.rows:,}",
        shards.row_tokens,
        f"{shards.documents:,}",
        shards.parts,
        shards.path,
    )
    left_out = {
        "empty documents": shards.empty_documents,
        "duplicates": shards.duplicates,
        "bad lines": shards.bad_lines,
    }
    if some := ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count):
        log.info("left out: %s", some)
    if shards.train.rows < config.train_rows:
        log.warning(
            "the corpus has %s of the %s rows that the run trains on: it is repeated %.1f times",
            f"{shards.train.rows:,}",
            f"{config.train_rows:,}",
            config.train_rows / shards.train.rows,
        )


def _refuse_bad_lines(facts: list[PartFacts], corpus: CorpusConfig) -> None:
    bad = sum(part.bad_lines for part in facts)
    if bad > corpus.bad_lines_limit:
        places = "\n  ".join(place for part in facts for place in part.bad_places)
        raise ValueError(
            f"{bad} bad lines, --bad-lines-limit {corpus.bad_lines_limit}:\n  {places}"
        )


def _note_build(path: Path, number: int, done: BuiltPart) -> None:
    if not done.seconds:
        return
    both = done.facts.train + done.facts.validation
    line = {
        "part": number,
        "time": time.time(),
        "seconds": done.seconds,
        "tokens": both.document_tokens,
        "text_bytes": both.text_bytes,
    }
    with (path / BUILDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
