"""plan.json of a shard set: its identity and the files of the corpus; and the job of each part."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from zeroflow import artifacts, reuse
from zeroflow.config import Config
from zeroflow.data import slice_pages, synthetic
from zeroflow.data.corpus import CorpusConfig, CorpusIdentity, list_files
from zeroflow.data.formats.file import CorpusFile
from zeroflow.data.holdout import EVERYTHING, NOTHING, Holdout, choose_holdout
from zeroflow.data.part_job import PartJob
from zeroflow.data.shards import Layout, ShardConfig, part_path
from zeroflow.data.slice_pages import SlicePage, SlicePages
from zeroflow.data.slices import Slice, all_slices
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.reuse import Fields

log = logging.getLogger(__name__)

PLAN = "plan.json"
"""File in the directory of a set."""

_SETTINGS = {*ShardConfig.model_fields, *CorpusConfig.model_fields, "seed", "vocab_size"}


class ShardIdentity(Config):
    """Everything that the bytes of a shard set depend on; its fingerprint is part of the name."""

    format: int
    corpus: CorpusIdentity
    tokenizer: str
    """Fingerprint of the tokenizer."""

    layout: Layout
    slice_bytes: int

    @property
    def fingerprint(self) -> str:
        return artifacts.fingerprint(self.model_dump(mode="json"))


class ShardPlan(Config):
    """plan.json."""

    identity: ShardIdentity
    tokenizer: str
    """Name of the tokenizer, for information."""

    digests: dict[str, str] = Field(default_factory=dict)
    """Digest of each local file, for information; absent in plans of earlier versions."""

    holdout: Holdout
    files: tuple[CorpusFile, ...]
    next_file: int = 0
    """Index of the first file whose slices are not in `slices`."""

    slices: tuple[Slice, ...] = ()
    """The first slices; the others are in `slice_pages`."""

    @model_validator(mode="before")
    @classmethod
    def _convert_older(cls, content: Any) -> Any:
        if isinstance(content, dict) and "held_out_below" in content:
            rest = {name: value for name, value in content.items() if name != "held_out_below"}
            return rest | {"holdout": {"below": content["held_out_below"]}}
        return content

    @classmethod
    def read(cls, path: Path) -> Self:
        """The plan of the set at `path`.

        Raises:
            DamagedArtifact: the plan is missing or damaged.
        """
        return cls.model_validate(artifacts.read_signed(path / PLAN))

    def write(self, path: Path) -> None:
        artifacts.write_signed(path / PLAN, self.model_dump(mode="json"))

    def fields(self) -> Fields:
        """Everything that the set depends on; settings are named by their flags."""
        corpus, layout = self.identity.corpus, self.identity.layout.model_dump()
        seq_len = layout.pop("row_tokens") - 1
        local = corpus["source"] in ("files", "sample")
        files = self.digests or ("unknown" if local else {})
        rest = self.identity.model_dump(exclude={"corpus", "layout"})
        fields = {"seq_len": seq_len, **layout, **corpus, "file": files, **rest}
        return reuse.by_flag(fields, _SETTINGS)


class PartPlanner:
    """Plans the parts of a set and returns their jobs.

    Slices are planned only as far as parts are requested, because planning may need requests to the
    hub. They depend on the corpus only, so any of several processes may write the plan.
    """

    def __init__(
        self,
        path: Path,
        corpus: CorpusConfig,
        tokenizer: Tokenizer,
        identity: ShardIdentity,
        *,
        seed: int,
    ) -> None:
        self.path, self.corpus, self.tokenizer = path, corpus, tokenizer
        self._layout, self._seed = identity.layout, seed
        self.begun_before = (path / PLAN).exists()
        """True if a plan existed: an earlier build was stopped, or its parts are damaged."""
        self.plan = self._known(identity) or self._new(identity)
        begin = SlicePage(first=0, next_file=self.plan.next_file, slices=self.plan.slices)
        few = len(self.plan.files) <= slice_pages.PAGE_SLICES
        save = self._save_first_slices if few else None
        self._slices = SlicePages(path, corpus, self.plan.files, begin, save)

    def _known(self, identity: ShardIdentity) -> ShardPlan | None:
        if not self.begun_before:
            return None
        try:
            known = ShardPlan.read(self.path)
        except artifacts.DamagedArtifact as damage:
            log.warning("%s: writing a new plan", damage)
            return None
        return known if known.identity == identity else None

    def _new(self, identity: ShardIdentity) -> ShardPlan:
        corpus, layout = self.corpus, self._layout
        self.require_text()
        plan = ShardPlan(
            identity=identity,
            tokenizer=self.tokenizer.name,
            digests=corpus.source.digests() if corpus.is_text else {},
            holdout=NOTHING
            if corpus.validation
            else choose_holdout(
                corpus, fraction=layout.validation_fraction, row_tokens=layout.row_tokens
            ),
            files=tuple(list_files(corpus)) if corpus.is_text else (),
            slices=_to_validate_on(corpus),
        )
        plan.write(self.path)
        return plan

    def require_text(self) -> None:
        """Check that the text is still that of the corpus's revision.

        Raises:
            ValueError: files are missing or have changed.
        """
        for corpus in (self.corpus, self.corpus.validation):
            if corpus and corpus.data_revision:
                corpus.source.require_revision(corpus.data_revision)

    def job(self, number: int) -> PartJob | None:
        """The job of part `number`; None if the corpus has fewer parts."""
        if (piece := self._slice(number)) is None:
            return None
        earlier = range(number) if self.corpus.deduplicate else ()
        return PartJob(
            path=part_path(self.path, number),
            piece=piece,
            corpus=self.corpus.validation if piece.held_out else self.corpus,
            tokenizer=self.tokenizer,
            layout=self._layout,
            holdout=EVERYTHING if piece.held_out else self.plan.holdout,
            seed=self._seed,
            earlier=tuple(part_path(self.path, i) for i in earlier),
        )

    def absent_from(self, number: int, *, limit: int) -> Iterator[PartJob]:
        """Jobs of up to `limit` absent parts from `number` on that can be built in parallel.

        The jobs end before the first part that exists. If duplicates are left out, there are none,
        because each part depends on those before it.
        """
        limit = 0 if self.corpus.deduplicate else limit
        for following in range(number, number + limit):
            job = self.job(following)
            if job is None or job.path.exists():
                return
            yield job

    def _save_first_slices(self, page: SlicePage) -> None:
        changed = {"slices": page.slices, "next_file": page.next_file}
        self.plan = self.plan.model_copy(update=changed)
        self.plan.write(self.path)

    def _slice(self, number: int) -> Slice | None:
        if not self.corpus.is_text:
            start = number * synthetic.PART_BLOCKS
            return Slice(start=start, stop=start + synthetic.PART_BLOCKS)
        return self._slices.slice(number)


def _to_validate_on(corpus: CorpusConfig) -> tuple[Slice, ...]:
    """Return the slices of the files for validation only, which become the first parts."""
    if (validation := corpus.validation) is None:
        return ()
    return tuple(piece.replace(held_out=True) for piece in all_slices(validation))
