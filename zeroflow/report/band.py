"""Expected training loss of a run, from earlier runs of the same model on the same data.

The planned tokens of a training are cut into 20 equal windows. The loss of a window is the mean of
the training losses logged in it, because a single batch is too noisy. In every window, the band is

    mean of the earlier runs ± t · s · √(1 + 1/n)

the 95 % prediction interval for one more such run. Two or three runs hardly determine a standard
deviation, so s is pooled over five neighbouring windows, and t is Student's t for their combined
degrees of freedom. 1/n accounts for the uncertainty of the mean.

With 20 windows, about half of all sound runs leave such a band somewhere. A run counts as out of
band if three windows in a row are out on the same side. In trainings of 400 steps of 512 tokens
with 24 seeds, 2 to 4 % of the runs were out of band, with bands of 2, 3, 5 or 8 other runs, and
pooled bands held 95 % of the windows.
"""

import logging
import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zeroflow.records import Record
from zeroflow.run_folder import RunFolder
from zeroflow.training.events import EVENTS, Started
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, MetricsRecord, StepRecord

log = logging.getLogger(__name__)

_WINDOWS = 20

_POOLED = 5

_IN_A_ROW = 3

_STUDENT = (1.589, 2.556, 2.822, 2.372, 1.960)
"""Coefficients of the 97.5 % quantile in powers of 1/f: Abramowitz and Stegun 26.7.5. Accurate
to 1 % for two or more degrees of freedom."""

Losses = npt.NDArray[np.float64]
"""One loss per window; NaN for a window without one."""


class Verdict(Record):
    """Comparison of a run's training loss with that of earlier runs."""

    earlier: int = 0
    """Number of earlier runs."""

    tokens: int = 0
    """Tokens at the end of the last window that can be compared; 0 if there is none."""

    apart: float = 0.0
    """Difference from the mean of the earlier runs there, in nats per token; positive is above."""

    judged: bool = False
    """True if there is a band, and the run has come far enough to leave it."""

    since: int | None = None
    """Tokens at which the run leaves the band; None if it never does."""

    until: int | None = None
    """Tokens at which the run is back in the band; None if it never returns."""

    miss: float = 0.0
    """Largest distance from the nearest edge of the band; positive is above."""

    def __str__(self) -> str:
        runs = f"{self.earlier} earlier run{'s' if self.earlier > 1 else ''}"
        if not self.judged:
            where = f": {_side(self.apart)} at {self.tokens:,} tokens" if self.tokens else ""
            return f"no band yet from {runs}{where}"
        if self.since is None:
            return f"in band ({runs})"
        end = f" to {self.until:,}" if self.until else ""
        return f"out of band from {self.since:,}{end} tokens: up to {_side(self.miss)} it ({runs})"


def _side(apart: float) -> str:
    return f"{abs(apart):.4f} {'above' if apart > 0 else 'below'}"


class Band(NamedTuple):
    job: TrainingJob
    """Job of the compared run."""

    runs: tuple[str, ...]
    """Names of the earlier runs, each with another seed."""

    mean: Losses
    width: Losses
    """Distance from the mean to either edge; NaN for fewer than two runs."""

    @property
    def ends(self) -> Losses:
        """Tokens at the ends of the windows."""
        return _planned_tokens(self.job) * np.arange(1, _WINDOWS + 1) / _WINDOWS

    @property
    def middles(self) -> Losses:
        """Tokens in the middle of the windows."""
        return self.ends - self.ends[0] / 2

    def smoothed(self, records: Iterable[MetricsRecord]) -> Losses:
        """Mean training loss of the run in each window, from its logged `records`."""
        return _smoothed(self.job, records)

    def verdict(self, records: Iterable[MetricsRecord]) -> Verdict:
        """Verdict on the run so far, from its logged `records`."""
        apart = self.smoothed(records) - self.mean
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
        return found.replace(
            since=round(self.ends[out[0]] - self.ends[0]),
            until=None if out[-1] == judged[-1] else round(self.ends[out[-1]]),
            miss=float(max(beyond[out], key=abs)),
        )


def find(job: TrainingJob) -> Band | None:
    """Find the band of the earlier runs in the cache of `job`; None if there are none.

    Earlier runs began before it, with the same model, data, batch, schedule and optimiser;
    unfinished ones count up to their last window. If several runs share a seed, the one that came
    furthest counts; of equals, the newest. An extended run is not compared: its schedule changed.
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
            # Written by another version, or damaged: this run must not fail because of it
            log.debug("run %s is left out of the expected loss: %s", folder.name, error)
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
        """Sort key among runs of one seed: completed windows, then start time."""
        return int(np.count_nonzero(~np.isnan(self.losses))), self.began


def _earlier(folder: RunFolder, job: TrainingJob, before: float) -> _Earlier | None:
    """Read the run in `folder`; None if `job` cannot be compared with it."""
    past = TrainingJob.read(folder.job).replace(run_dir=folder.path)
    if _decisive(past) != _decisive(job):
        return None
    began = _began(past)
    if began is None or began >= before:
        return None
    losses = _smoothed(past, METRICS.read(folder.metrics))
    if np.isnan(losses).all():
        return None
    return _Earlier(folder.name, past.training.seed, began, losses)


def _decisive(job: TrainingJob) -> tuple[Any, ...]:
    """Everything that determines the loss curve, except the seed and rounding."""
    training = job.training
    settings = training.model_dump(exclude={"seed", "workload"})
    # the folder's name contains a fingerprint of corpus, tokenizer and row layout
    data = (job.shards.path.name, job.shards.parts)
    return (settings, training.workload.mathematics, *data)


def _began(job: TrainingJob) -> float | None:
    """Start time of training, infinite if not started; None if its number of steps was changed."""
    starts = [event for event in EVENTS.read(job.folder.events) if isinstance(event, Started)]
    if any(start.steps != job.training.steps for start in starts):
        return None
    return starts[0].time if starts else math.inf


def _planned_tokens(job: TrainingJob) -> int:
    return job.training.steps * job.training.workload.batch_tokens


def _smoothed(job: TrainingJob, records: Iterable[MetricsRecord]) -> Losses:
    """Mean training loss of every complete window."""
    points = [(r.tokens, r.loss) for r in records if isinstance(r, StepRecord)]
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
    """Mean of the curves (one per row), and the half-width of the band around it."""
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
