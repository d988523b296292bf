"""Builds the parts of a shard set with several processes, on any machines that share the cache.

Each process claims a part that no other process is building, builds it, and continues with the
next. The processes communicate only through the files of the set, so they may start, end and fail
at any time.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts
from zeroflow.artifacts import DamagedArtifact
from zeroflow.data import known_parts
from zeroflow.data.build import refuse_bad_lines, require_rows
from zeroflow.data.builders import Builders, Ending
from zeroflow.data.claims import Claim, Claims
from zeroflow.data.known_parts import KnownParts
from zeroflow.data.needed import Needed
from zeroflow.data.part_job import PartJob
from zeroflow.data.part_plan import PartPlanner
from zeroflow.data.shards import PartManifest, ShardConfig, part_path

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
"""Time between two checks of a process that has nothing to build while others still build. A check
reads the claims of the others, which may be a thousand files in a shared folder."""


class Shared(NamedTuple):
    """Result of a process for a set that is now complete."""

    path: Path
    built: int
    """Number of parts that the process built."""

    parts: int
    """Number of all parts that the run needs."""


class _UnderWay(NamedTuple):
    claim: Claim
    ending: Ending


def build_together(planner: PartPlanner, config: ShardConfig, builders: Builders) -> Shared:
    """Build parts that no other process is building, until all parts that `config` needs exist.

    If another process dies, its part is taken over. Existing parts are not verified; the run that
    reads them does so in `build_shards`.

    Raises:
        ValueError: the content of the corpus is not valid, or it has too little text.
        hub.HubError: the hub failed.
    """
    planner.require_text()
    with Claims() as claims:
        return _SharedBuild(planner, config, builders, claims).run()


class _SharedBuild:
    def __init__(
        self, planner: PartPlanner, config: ShardConfig, builders: Builders, claims: Claims
    ) -> None:
        self._planner, self._builders, self._claims = planner, builders, claims
        self._under_way: deque[_UnderWay] = deque()
        self._needed = Needed(config, planner.corpus, planner.tokenizer)
        self._known = KnownParts(planner.path, self._needed, verified=False)
        self._next = 0
        """Number of the part after the last one that this process claimed."""

    def run(self) -> Shared:
        built = 0
        # Once all parts exist, those of this process that are still listed have been built too
        while not self._is_complete() or self._under_way:
            self._start_some()
            if not self._under_way:
                time.sleep(POLL_SECONDS)
                continue
            claim, ending = self._under_way.popleft()
            done = ending()
            lost = claim.is_lost
            self._claims.release(claim)
            if not isinstance(done, Exception):
                built += bool(done.seconds)
            elif not lost:
                raise done
        require_rows(self._needed.counts)
        return Shared(self._planner.path, built, len(self._needed.counts))

    def _is_complete(self) -> bool:
        """Count the existing parts from the first on. Return True if these are enough, or if the
        corpus has no more.

        Raises:
            ValueError: they have too many bad lines.
        """
        counts, path = self._needed.counts, self._planner.path
        while not self._needed.is_met:
            if len(lines := self._known.following()):
                counts.extend(lines)
                continue
            number = len(counts)
            part = part_path(path, number)
            # Before the manifest is read, because another process may complete the part meanwhile
            if not part.exists():
                return self._planner.job(number) is None
            try:
                counts.append(PartManifest.read(part).facts)
            except DamagedArtifact as damage:
                with suppress(FileNotFoundError):  # another process has done so already
                    artifacts.set_aside(part, damage)
                return False
            known_parts.complete_page(path, len(counts))
            refuse_bad_lines(path, counts, self._planner.corpus)
        return True

    def _start_some(self) -> None:
        """Claim and start parts, up to the number that this process builds at the same time."""
        while len(self._under_way) < self._builders.at_once:
            found = next(self._free_parts(), None)
            if found is None:
                return
            job, claim = found
            ending = self._builders.start(job.replace(claim=claim.mark))
            self._under_way.append(_UnderWay(claim, ending))

    def _free_parts(self) -> Iterator[tuple[PartJob, Claim]]:
        """Yield needed parts that no process is building, each with its claim.

        The parts after the last claim of this process come first, because those before it are
        complete or being built by others.
        """
        first = len(self._needed.counts)
        end = first + (1 if self._planner.corpus.deduplicate else self._needed.missing_parts)
        last = min(max(first, self._next), end)
        for numbers in (range(last, end), range(first, last)):
            for number in numbers:
                if (job := self._planner.job(number)) is None:
                    break
                if claim := self._claims.take(job.path):
                    self._next = number + 1
                    yield job, claim
