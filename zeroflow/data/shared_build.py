"""Building the parts of a shard set by several processes, on any machines that share the cache.

Each process claims a part that no other builds, builds it, and looks for the next. They exchange
nothing but the files of the set, so they may come, go and die at any time.
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
from zeroflow.data.build import refuse_bad_lines
from zeroflow.data.builders import Builders, Ending
from zeroflow.data.claims import Claim, Claims
from zeroflow.data.known_parts import KnownParts
from zeroflow.data.needed import Needed
from zeroflow.data.part_job import PartJob
from zeroflow.data.part_plan import PartPlanner
from zeroflow.data.shards import PartManifest, ShardConfig, part_path

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Pause of a process for which nothing is left to build, until it looks again."""


class Shared(NamedTuple):
    """What a process did for a set that is complete now."""

    path: Path
    built: int
    """Parts that it built."""

    parts: int
    """All parts that a run needs."""


class _UnderWay(NamedTuple):
    claim: Claim
    ending: Ending


def build_together(planner: PartPlanner, config: ShardConfig, builders: Builders) -> Shared:
    """Build parts that no other process builds, until all that `config` needs exist.

    A part whose builder died is taken over. Parts that exist are not verified; `build_shards` does
    that in the run that reads them.

    Raises:
        ValueError: the content of the corpus is not valid.
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
        while not self._is_complete():
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
        return Shared(self._planner.path, built, len(self._needed.counts))

    def _is_complete(self) -> bool:
        """Count the parts that exist, from the first on; True if they are enough or all there are.

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
            try:
                counts.append(PartManifest.read(part).facts)
            except DamagedArtifact as damage:
                if part.exists():
                    with suppress(FileNotFoundError):  # another process was faster
                        artifacts.set_aside(part, damage)
                return self._planner.job(number) is None
            known_parts.complete_page(path, len(counts))
            refuse_bad_lines(path, counts, self._planner.corpus)
        return True

    def _start_some(self) -> None:
        """Claim and start parts, up to as many as this process builds at once."""
        while len(self._under_way) < self._builders.at_once:
            found = next(self._free_parts(), None)
            if found is None:
                return
            job, claim = found
            ending = self._builders.start(job.replace(claim=claim.mark))
            self._under_way.append(_UnderWay(claim, ending))

    def _free_parts(self) -> Iterator[tuple[PartJob, Claim]]:
        """Parts that are needed and that nobody builds, each claimed.

        Those after the last claim of this process come first: those before it are built already, or
        others build them.
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
