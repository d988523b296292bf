"""The loss that earlier runs of the same model on the same data lead to expect, and its spread.

The planned tokens of a training are cut into 20 equal windows, and a loss is the mean of the logged
training losses in a window: a single batch says little. In every window, the band is

    mean of the earlier runs ± t · s · √(1 + 1/n)

the interval that holds the loss of one more such run 95 times in 100. Of two or three runs a
standard deviation is hardly known, so s is pooled over five neighbouring windows, and t is
Student's, at the degrees of freedom that these have together. The mean is uncertain as well, which
is what 1/n stands for.

With 20 windows, about half of all sound runs leave such a band somewhere. A run counts as out of
band where three windows in a row are, on one side. In trainings of 400 steps of 512 tokens with 24
seeds, that was said of 2 to 4 % of the runs, whether 2, 3, 5 or 8 others were the band, and pooled
bands held 95 % of the windows.
"""

import logging
import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zeroflow import artifacts, records
from zeroflow.records import Line
from zeroflow.run_folder import RunFolder
from zeroflow.training.job import TrainingJob

log = logging.getLogger(__name__)


_WINDOWS = 20


_POOLED = 5


_IN_A_ROW = 3


_STUDENT = (1.589, 2.556, 2.822, 2.372, 1.960)
"""Of the 97.5 % quantile, in powers of 1/f: Abramowitz and Stegun 26.7.5. Within 1 % from two
degrees of freedom on."""


Losses = npt.NDArray[np.float64]
"""One of each window; NaN where there is none."""


class Verdict(NamedTuple):
    """Where a run is, compared with earlier ones."""

    earlier: int
    """Runs."""

    tokens: int
    """At the end of the last window in which there is something to compare; 0 if there is none."""

    apart: float
    """From the mean of the earlier runs there, in nats per token; positive is above."""

    judged: bool
    """Whether there is a band, and enough of the run to be out of it."""

    since: int | None = None
    """Tokens from which it is out of band; None if it never is."""

    until: int | None = None
    """Tokens from which it is not any more; None if it is to the last."""

    miss: float = 0.0
    """Of the nearest edge of the band, where it is largest; positive is above."""

    def __str__(self) -> str:
        runs = f"{self.earlier} earlier run{'s' if self.earlier > 1 else ''}"
        if not self.judged:
            there = f": {_side(self.apart)} at {self.tokens:,} tokens" if self.tokens else ""
            return f"no band yet from {runs}{there}"
        if self.since is None:
            return f"in band ({runs})"
        end = f" to {self.until:,}" if self.until else ""
        return f"out of band from {self.since:,}{end} tokens: up to {_side(self.miss)} it ({runs})"


def _side(apart: float) -> str:
    return f"{abs(apart):.4f} {'above' if apart > 0 else 'below'}"


class Band(NamedTuple):
    job: TrainingJob
    """Of the run that is compared."""

    runs: tuple[str, ...]
    """Earlier ones, by name, each of another seed."""

    mean: Losses
    width: Losses
    """From the mean to either edge; NaN where fewer than two runs came."""

    @property
    def ends(self) -> Losses:
        """Tokens at the ends of the windows."""
        return _planned_tokens(self.job) * np.arange(1, _WINDOWS + 1) / _WINDOWS

    @property
    def middles(self) -> Losses:
        """Tokens in the middle of the windows."""
        return self.ends - self.ends[0] / 2

    def smoothed(self, lines: Iterable[Line]) -> Losses:
        """The run's training loss as it is compared, from the lines of its metrics.jsonl."""
        return _smoothed(self.job, lines)

    def verdict(self, lines: Iterable[Line]) -> Verdict:
        """Of the run with these lines in its metrics.jsonl, as far as it has come."""
        apart = self.smoothed(lines) - self.mean
        beyond = np.sign(apart) * np.maximum(np.abs(apart) - self.width, 0)
        compared = np.flatnonzero(~np.isnan(apart))
        judged = [int(window) for window in np.flatnonzero(~np.isnan(beyond))]
        found = Verdict(
            earlier=len(self.runs),
            tokens=round(self.ends[compared[-1]]) if compared.size else 0,
            apart=float(apart[compared[-1]]) if compared.size else 0.0,
            judged=len(judged) >= _IN_A_ROW,
        )
        out: list[int] = []
        for side, windows in groupby(judged, key=lambda window: np.sign(beyond[window])):
            in_a_row = list(windows)
            if side and len(in_a_row) >= _IN_A_ROW:
                out += in_a_row
        if not out:
            return found
        return found._replace(
            since=round(self.ends[out[0]] - self.ends[0]),
            until=None if out[-1] == judged[-1] else round(self.ends[out[-1]]),
            miss=float(max(beyond[out], key=abs)),
        )


def find(job: TrainingJob) -> Band | None:
    """What earlier runs beside that of `job` lead to expect of it; None if there are none.

    They began before it, with the same model, data, batch, schedule and optimiser, and count as far
    as they came. Of several with the same seed the one that came furthest counts, the newest of
    these. A run that was extended is compared with nothing, as its schedule changed on the way.
    """
    before = _began(job)
    if before is None:
        return None
    by_seed: dict[int, _Earlier] = {}
    for folder in job.folder.cache.existing_runs():
        if folder.name == job.folder.name or not folder.job.exists():
            continue
        try:
            run = _earlier(folder, job, before)
        except (OSError, ValueError, LookupError, TypeError) as error:
            # Of another version, or damaged: such a run is no reason to end this one
            log.debug("run %s says nothing of the loss to expect: %s", folder.name, error)
            continue
        if run is not None:
            by_seed[run.seed] = max(run, by_seed.get(run.seed, run), key=_Earlier.weight)
    if not by_seed:
        return None
    runs = sorted(by_seed.values(), key=lambda run: run.began)
    mean, width = _spread(np.stack([run.losses for run in runs]))
    return Band(job, tuple(run.name for run in runs), mean, width)


class _Earlier(NamedTuple):
    name: str
    seed: int
    began: float
    losses: Losses

    def weight(self) -> tuple[int, float]:
        """By which runs of one seed are chosen from: windows it came through, and its time."""
        return int(np.count_nonzero(~np.isnan(self.losses))), self.began


def _earlier(folder: RunFolder, job: TrainingJob, before: float) -> _Earlier | None:
    """The run with this job.json; None if it has nothing to say of `job`."""
    past = TrainingJob.model_validate(artifacts.read_json(folder.job)).replace(run_dir=folder.path)
    if _decisive(past) != _decisive(job):
        return None
    began = _began(past)
    if began is None or began >= before:
        return None
    losses = _smoothed(past, records.read(folder.metrics))
    if np.isnan(losses).all():
        return None
    return _Earlier(folder.name, past.training.seed, began, losses)


def _decisive(job: TrainingJob) -> tuple[Any, ...]:
    """What decides the curve of the loss, up to the seed and what devices and precisions change."""
    training = job.training
    settings = training.model_dump(exclude={"seed", "workload"})
    # the folder's name has a fingerprint of corpus, tokenizer and layout of the rows
    data = (job.shards.path.name, job.shards.parts)
    return (settings, training.workload.mathematics, *data)


def _began(job: TrainingJob) -> float | None:
    """When training began, infinite if it has not; None if it was planned with other steps once."""
    history = records.read(job.folder.events)
    starts = [line for line in history if line["event"] == "started"]
    if any(line["steps"] != job.training.steps for line in starts):
        return None
    return starts[0]["time"] if starts else math.inf


def _planned_tokens(job: TrainingJob) -> int:
    return job.training.steps * job.training.workload.batch_tokens


def _smoothed(job: TrainingJob, lines: Iterable[Line]) -> Losses:
    """Mean training loss of every window that is complete."""
    points = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    if not points:
        return np.full(_WINDOWS, np.nan)
    tokens, losses = (np.array(column) for column in zip(*points, strict=True))
    planned = _planned_tokens(job)
    windows = (tokens * _WINDOWS - 1) // planned
    counts = np.bincount(windows, minlength=_WINDOWS).astype(float)
    complete = tokens[-1] * _WINDOWS >= planned * np.arange(1, _WINDOWS + 1)
    counts[(counts == 0) | ~complete] = np.nan
    return np.bincount(windows, losses, minlength=_WINDOWS) / counts


def _spread(curves: npt.NDArray[np.float64]) -> tuple[Losses, Losses]:
    """Mean and width of the band around it, of one curve a row."""
    runs = np.count_nonzero(~np.isnan(curves), axis=0)
    mean = np.nansum(curves, axis=0) / np.where(runs, runs, np.nan)
    squares = np.nansum((curves - mean) ** 2, axis=0)
    freedom = np.maximum(runs - 1, 0)
    width = np.full(_WINDOWS, np.nan)
    for window in map(int, np.flatnonzero(freedom)):
        first = min(max(window - _POOLED // 2, 0), _WINDOWS - _POOLED)
        near = slice(first, first + _POOLED)
        f = freedom[near].sum()
        variance = squares[near].sum() / f
        student = np.polyval(_STUDENT, 1 / f)
        width[window] = student * math.sqrt(variance * (1 + 1 / runs[window]))
    return mean, width
