"""Builds the parts of a shard set that a run needs."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt

from zeroflow import artifacts, reuse
from zeroflow.data import known_parts, slices, synthetic
from zeroflow.data.build_times import note_build
from zeroflow.data.builders import Builders, Ending, in_threads
from zeroflow.data.corpus import CorpusConfig, CorpusIdentity, corpus_identity
from zeroflow.data.holdout import MOST_OF_A_SMALL_CORPUS, SOME_ROWS
from zeroflow.data.known_parts import KnownParts
from zeroflow.data.needed import Needed
from zeroflow.data.part_counts import PartCounts
from zeroflow.data.part_plan import PLAN, PartPlanner, ShardIdentity, ShardPlan
from zeroflow.data.parts import existing_part
from zeroflow.data.rows import Rows
from zeroflow.data.shards import SPLITS, PartFacts, PartManifest, ShardConfig, ShardSet, part_path
from zeroflow.data.sufficient import too_small
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.reuse import Fields
from zeroflow.run_folder import Cache
from zeroflow.units import count

log = logging.getLogger(__name__)

_MANY_EMPTY = 0.1
"""Fraction of empty documents above which their number is a warning."""

FORMAT = 5
"""Version of the format of the files. It is part of the fingerprint: a new version has new sets."""

_OLDER_FORMATS = (4, 3)
"""Formats that are read, but no longer written. Their sets are used unchanged, so that their runs
can be resumed. Format 4 could hold out too little of a corpus with many documents, or all short
documents of a corpus with one long document. Format 3 only held out whole documents. In all other
cases, the rows are those of format 5."""

_ENTROPY_TOKENS = 2**22
"""Number of tokens of synthetic data whose entropy is computed."""

OnPart = Callable[[float, str], None]
"""Called with the fraction done, from 0 to 1, and a line that describes the progress."""


def build_shards(
    config: ShardConfig,
    corpus: CorpusConfig,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    seed: NonNegativeInt = 0,
    builders: Builders | None = None,
    show: OnPart = lambda share, text: None,
) -> ShardSet:
    """Ensure that `<cache>/shards/` has the rows that `config` asks for.

    Existing parts are verified (in a large set, some of them; see `known_parts`) and reused. If the
    corpus is too small, the set has all its rows.

    Args:
        corpus: a resolved corpus.
        seed: seed of synthetic data.
        builders: builders of the parts; None for one thread of this process. The number of parts
            that are built at once never exceeds the number that the run is likely to need.
        show: called after each part.

    Raises:
        ValueError: ids do not fit the integer type, the corpus is too small to hold out a
            document, or its content is not valid.
        hub.HubError: the hub failed.
    """
    planner = planned(config, corpus, tokenizer, cache, seed=seed)
    with nullcontext(builders) if builders else in_threads(1) as chosen:
        build = _Build(planner, config, chosen, show)
        build.run()
    shards = _describe(planner, build.counts, config)
    shards = shards.replace(reused=not build.built, why=build.why)
    if build.built:  # a corpus that ended early has not reported 100 %
        show(1.0, f"{count(shards.parts, 'part')}, {count(shards.train.rows, 'row')} to train on")
    _log(shards, config, build.built)
    if not corpus.validation:
        _log_share(shards, config.validation_fraction, planner.plan)
    return shards


def planned(
    config: ShardConfig, corpus: CorpusConfig, tokenizer: Tokenizer, cache: Path, *, seed: int
) -> PartPlanner:
    """Return the planner of the parts of the set that `build_shards` builds.

    Raises:
        ValueError, hub.HubError: as `build_shards` does.
    """
    _require_ids_fit(config, tokenizer)
    newest = ShardIdentity(
        format=FORMAT,
        corpus=_documents_identity(corpus, tokenizer, seed),
        tokenizer=tokenizer.fingerprint,
        layout=config.layout,
        slice_bytes=slices.SLICE_BYTES,
    )
    stem = f"{corpus.name}-{config.seq_len}"
    path, identity = _set_to_use(Cache(cache).shards / stem, newest)
    return PartPlanner(path, corpus, tokenizer, identity, seed=seed)


def _set_to_use(stem: Path, newest: ShardIdentity) -> tuple[Path, ShardIdentity]:
    """Return the set of the newest format; if there is none, a usable set of an older format."""
    known = [newest, *(newest.replace(format=older) for older in _OLDER_FORMATS)]
    paths = [stem.with_name(f"{stem.name}-{identity.fingerprint}") for identity in known]
    if (paths[0] / PLAN).exists():
        return paths[0], newest
    for path, identity in zip(paths[1:], known[1:], strict=True):
        if _is_usable(path):
            return path, identity
    return paths[0], newest


def _is_usable(path: Path) -> bool:
    """Return True if the set at `path` has rows of both splits."""
    train = validation = number = 0
    try:
        ShardPlan.read(path)
        while not (train and validation):
            facts = PartManifest.read(part_path(path, number)).facts
            train, validation = train + facts.train.rows, validation + facts.validation.rows
            number += 1
    except artifacts.DamagedArtifact:  # also if there are no more parts
        return False
    return True


def _require_ids_fit(config: ShardConfig, tokenizer: Tokenizer) -> None:
    highest = np.iinfo(config.token_type).max
    if tokenizer.vocab_size - 1 > highest:
        raise ValueError(
            f"{tokenizer.name} has {tokenizer.vocab_size} tokens, more than {config.token_type} "
            f"holds (ids up to {highest}): use --token-type int32"
        )


def _documents_identity(corpus: CorpusConfig, tokenizer: Tokenizer, seed: int) -> CorpusIdentity:
    if not corpus.is_text:
        return {"source": "synthetic", "seed": seed, "vocab_size": tokenizer.vocab_size}
    identity = corpus_identity(corpus) | {"deduplicate": corpus.deduplicate}
    return identity | ({"validation": corpus.validation_revision} if corpus.validation else {})


class _Build:
    """A build in progress: the counts of existing parts, and the reasons for building others."""

    def __init__(
        self, planner: PartPlanner, config: ShardConfig, builders: Builders, show: OnPart
    ) -> None:
        self._planner, self._builders, self._show = planner, builders, show
        self._needed = Needed(config, planner.corpus, planner.tokenizer)
        self.counts = self._needed.counts
        """Counts of parts 0, 1, ..., up to the first that does not exist."""
        self.built = 0
        """Number of parts that this build has built; the others were reused."""
        self._reasons: dict[Path, str] = {}
        """Reasons for building parts, by the damaged part, or by the set if parts were absent."""

    def run(self) -> None:
        begun = time.monotonic()
        known = KnownParts(self._planner.path, self._needed)
        with _waited_for(self._builders) as under_way:
            while not self._needed.is_met:
                if not under_way and len(lines := known.following()):
                    self.counts.extend(lines)
                    continue
                if not (job := self._planner.job(len(self.counts))):
                    break
                if not under_way:
                    missing = job.path if job.path.exists() else self._planner.path
                    if facts := existing_part(job.path):
                        self._add(facts)
                        continue
                    self._planner.require_text()
                    self._explain(missing)
                    under_way.append((missing, self._builders.start(job)))
                self._start_following(under_way)
                missing, ending = under_way.popleft()
                done = ending()
                if isinstance(done, Exception):
                    raise done
                self._explain(missing)
                self.built += 1
                self._add(done.facts)
                note_build(self._planner.path, len(self.counts) - 1, done)
                refuse_bad_lines(self._planner.path, self.counts, self._planner.corpus)
                self._show(*self._needed.progress(self.built, time.monotonic() - begun))
        refuse_bad_lines(self._planner.path, self.counts, self._planner.corpus)

    def _add(self, facts: PartFacts) -> None:
        self.counts.append(facts)
        known_parts.complete_page(self._planner.path, len(self.counts))

    @property
    def why(self) -> str:
        if not self.built:
            return reuse.SAME
        parts, reasons = len(self.counts), "; ".join(self._reasons.values())
        reused = parts - self.built
        return f"{reused} of {count(parts, 'part')} reused: {reasons}" if reused else reasons

    def _start_following(self, under_way: deque[tuple[Path, Ending]]) -> None:
        """Start as many further parts as the builders can work on at once."""
        limit = min(self._builders.at_once, self._needed.missing_parts) - len(under_way)
        for job in self._planner.absent_from(len(self.counts) + len(under_way), limit=limit):
            under_way.append((self._planner.path, self._builders.start(job)))

    def _explain(self, missing: Path) -> None:
        """Log why parts are built, once for each reason."""
        if missing in self._reasons:
            return
        damaged = missing != self._planner.path
        self._reasons[missing] = reuse.damaged(missing) if damaged else self._lack()
        log.info("building shards: %s", self._reasons[missing])

    def _lack(self) -> str:
        """Return why the next part, which is needed, does not exist."""
        planner, path = self._planner, self._planner.path
        if len(self.counts):
            needed, (train, validation) = self._needed, self._needed.rows
            existing = count(len(self.counts), "existing part")
            return (
                f"{existing}: {train:,} of {needed.train_rows:,} rows "
                f"to train on, {validation:,} of {needed.validation_rows:,} to validate on"
            )
        if planner.begun_before:
            return f"an earlier build of {path.name} stopped before its first part was complete"
        others = reuse.existing(path.parent, _recorded_fields, but=path)
        return reuse.nearest(planner.plan.fields(), others)


@contextmanager
def _waited_for(builders: Builders) -> Iterator[deque[tuple[Path, Ending]]]:
    """Yield the queue of parts that are being built, each with the path that was missing.

    At the end of the block, wait for parts that are no longer needed, and ignore their failures.
    After an interrupt, do not wait.
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


def _recorded_fields(path: Path) -> Fields:
    return ShardPlan.read(path).fields()


_BAD_PLACES = 10
"""Maximum number of bad lines whose place is in an error message."""


def refuse_bad_lines(path: Path, counts: PartCounts, corpus: CorpusConfig) -> None:
    """Check the limit for all parts together: each slice was read with the full limit."""
    bad = counts.total("bad_lines")
    if bad > corpus.bad_lines_limit:
        numbers = np.flatnonzero(counts.column("bad_lines"))[:_BAD_PLACES].tolist()
        found = (PartManifest.read(part_path(path, number)).facts for number in numbers)
        places = "\n  ".join([place for part in found for place in part.bad_places][:_BAD_PLACES])
        raise ValueError(
            f"{count(bad, 'bad line')}, --bad-lines-limit {corpus.bad_lines_limit}:\n  {places}"
        )


def require_rows(counts: PartCounts) -> None:
    """
    Raises:
        ValueError: there is nothing to train on, or nothing to validate on.
    """
    found = {split: counts.split(split) for split in SPLITS}
    for split, facts in found.items():
        if not facts.rows:
            raise too_small(sum(each.text_bytes for each in found.values()), split)


def _describe(planner: PartPlanner, counts: PartCounts, config: ShardConfig) -> ShardSet:
    tokenizer = planner.tokenizer
    require_rows(counts)
    train, validation = (counts.split(split) for split in SPLITS)
    shards = ShardSet(
        path=planner.path,
        parts=len(counts),
        row_tokens=config.layout.row_tokens,
        end_of_text=tokenizer.end_of_text,
        train=train,
        validation=validation,
        empty_documents=counts.total("empty_documents"),
        duplicates=counts.total("duplicates"),
        bad_lines=counts.total("bad_lines"),
        held_out_ends=_held_out_ends(planner, counts),
        entropy=None,
    )
    if tokenizer.path is not None:
        return shards
    rows = Rows(shards, "train")
    some = min(len(rows), max(1, _ENTROPY_TOKENS // rows.row_tokens))
    spread = rows[np.linspace(0, len(rows), some, endpoint=False).astype(np.int64)]
    return shards.replace(entropy=synthetic.chain_loss(spread, tokenizer.vocab_size))


def _held_out_ends(planner: PartPlanner, counts: PartCounts) -> int:
    found = counts.total("held_out_ends")
    # Earlier versions did not count them. If one document was cut, it is in one of all parts
    is_whole = planner.plan.holdout.tail is not None and planner.job(len(counts)) is None
    return found or int(is_whole)


def _log(shards: ShardSet, config: ShardConfig, built: int) -> None:
    log.info(
        "shards %s (%d of %s reused): %s and %s of %s tokens, from %s: %s",
        "built" if built else "reused",
        shards.parts - built,
        count(shards.parts, "part"),
        count(shards.train.rows, "training row"),
        count(shards.validation.rows, "validation row"),
        f"{shards.row_tokens:,}",
        count(shards.documents, "document"),
        shards.path,
    )
    left_out = {
        "empty document": shards.empty_documents,
        "duplicate": shards.duplicates,
        "bad line": shards.bad_lines,
    }
    if some := ", ".join(count(number, what) for what, number in left_out.items() if number):
        empty = shards.empty_documents
        much = empty > _MANY_EMPTY * (empty + shards.documents)
        log.log(logging.WARNING if much else logging.INFO, "left out: %s", some)
    if shards.train.rows < config.train_rows:
        log.warning(
            "the corpus has %s of the %s rows that the run trains on: it is repeated %.1f times",
            f"{shards.train.rows:,}",
            f"{config.train_rows:,}",
            config.train_rows / shards.train.rows,
        )
    if shards.validation.rows < config.validation_rows:
        log.info(
            "the validation text has only %s of the %s rows of --validation-tokens: all are used",
            f"{shards.validation.rows:,}",
            f"{config.validation_rows:,}",
        )


def _log_share(shards: ShardSet, fraction: float, plan: ShardPlan) -> None:
    """Log the share of held-out tokens, with the reason, if it differs from the setting."""
    train, held_out = shards.train, shards.validation
    share = held_out.document_tokens / (train.document_tokens + held_out.document_tokens)
    if 1 / 2 < share / fraction < 2:
        return
    of_bytes = held_out.text_bytes / max(train.text_bytes + held_out.text_bytes, 1)
    if plan.identity.format < FORMAT:
        why = f"an earlier version built {shards.path.name}; delete it to hold out text again"
    elif 1 / 2 < of_bytes / fraction < 2:
        each = (split.text_bytes / split.document_tokens for split in (held_out, train))
        why = (
            "the setting counts bytes; there are {:.1f} per token in this text, {:.1f} in the rest"
        )
        why = why.format(*each)
    elif plan.holdout.longest is not None and of_bytes > fraction:  # the text was measured
        why = f"at least {SOME_ROWS} rows are held out, or {MOST_OF_A_SMALL_CORPUS:.0%} of a "
        why += "shorter text"
    else:
        why = (
            f"a hash chose {held_out.documents:,} of {count(shards.documents, 'document')}, "
            "independent of their length"
        )
    log.warning(
        "%.1f %% of the tokens are held out for validation, and --validation-fraction asks for "
        "%.1f %%: %s",
        100 * share,
        100 * fraction,
        why,
    )
