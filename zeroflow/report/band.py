"""Expected training loss of a run, based on earlier runs of the same model on the same data.

The steps of the run are divided into 20 equal windows. In each window the run is compared with
every earlier run over the steps that both of them logged, so logging intervals do not matter. The
difference from the mean of the earlier runs should be within

    t · s · √(1 + 1/n)

s is the standard deviation of the n earlier runs, pooled over five neighbouring windows, because a
few runs give a poor estimate. 1/n accounts for the uncertainty of their mean. The band is
simultaneous: 95 % of all normal runs are inside it from their first window to their last. Therefore
t is the quantile of Student's t at 1 - 5 %/20.

The windows of a run are not independent: a run that is above the others stays above them. In 32
runs of 400 steps, and 24 of 200, with different seeds, windows correlated at 0.6 to 0.7, and
distant windows hardly less. So five pooled windows count with half of their degrees of freedom.
The band of 3, 4, 5 or 8 of these runs contained 93 to 99 % of the others, and so did the band of
simulated runs with a correlation of up to 0.97. A band of two earlier runs would be three times as
wide, so at least three are needed.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from zeroflow.records import Record
from zeroflow.report.intervals import student
from zeroflow.run_folder import RunFolder
from zeroflow.training import recovery
from zeroflow.training.events import EVENTS, Failed, Started
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS, MetricsRecord, StepRecord
from zeroflow.units import count

log = logging.getLogger(__name__)

_WINDOWS = 20
"""Number of windows of equal length into which the planned steps are divided."""

_POOLED = 5
"""Number of neighbouring windows whose standard deviations are pooled."""

_FEWEST = 3
"""Minimum number of earlier runs for a band."""

_HELD = 0.95
"""Fraction of normal runs that are inside the band in all windows."""

Losses = npt.NDArray[np.float64]
"""One loss per step or per window; NaN for a step or window without one."""


class Verdict(Record):
    """Comparison of a run's training loss with that of earlier runs."""

    @model_validator(mode="before")
    @classmethod
    def _rename_older_fields(cls, content: Any) -> Any:
        if isinstance(content, dict) and "miss" in content:
            return {"distance": content["miss"]} | content
        return content

    earlier: int = 0
    """Number of earlier runs."""

    tokens: int = 0
    """Tokens at the end of the last window that can be compared; 0 if there is none."""

    apart: float = 0.0
    """Difference from the mean of the earlier runs there, in nats per token; positive is above."""

    judged: bool = False
    """True if there is a band, and the run is long enough to leave it."""

    since: int | None = None
    """Tokens at which the run leaves the band; None if it never does."""

    until: int | None = None
    """Tokens at which the run returns to the band; None if it never does."""

    distance: float = 0.0
    """Largest distance from the nearest edge of the band; positive is above."""

    def __str__(self) -> str:
        runs = count(self.earlier, "earlier run")
        if not self.judged:
            where = f": {_side(self.apart)} at {self.tokens:,} tokens" if self.tokens else ""
            return f"no band yet from {runs}{where}"
        if self.since is None:
            return f"in band ({runs})"
        end = f" to {self.until:,}" if self.until else ""
        return (
            f"out of band from {self.since:,}{end} tokens: up to {_side(self.distance)} it ({runs})"
        )


def _side(apart: float) -> str:
    return f"{abs(apart):.4f} {'above' if apart > 0 else 'below'}" if apart else "equal"


class EarlierRun(NamedTuple):
    """An earlier run with the same model, data and settings."""

    name: str
    seed: int
    began: float
    losses: Losses
    """Training loss of every logged step in its complete windows; NaN for the other steps."""

    def weight(self) -> tuple[int, float]:
        """Sort key among runs of one seed: number of steps done, then start time."""
        return int(np.flatnonzero(~np.isnan(self.losses))[-1]), self.began


class Expected(NamedTuple):
    """Expected losses of a run, over the steps that it shares with earlier runs."""

    own: Losses
    """Mean loss of the run in each of its complete windows."""

    mean: Losses
    width: Losses
    """Distance from the mean to each edge of the band; NaN for too few runs."""


class Band(NamedTuple):
    job: TrainingJob
    """Job of the compared run."""

    earlier: tuple[EarlierRun, ...]
    """Earlier runs, each with a different seed."""

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the earlier runs."""
        return tuple(run.name for run in self.earlier)

    @property
    def ends(self) -> Losses:
        """Tokens at the ends of the windows."""
        planned = self.job.training.steps * self.job.training.workload.batch_tokens
        return planned * np.arange(1, _WINDOWS + 1) / _WINDOWS

    @property
    def middles(self) -> Losses:
        """Tokens in the middle of the windows."""
        return self.ends - self.ends[0] / 2

    def expected(self, records: Iterable[MetricsRecord]) -> Expected:
        """Return the expected losses of the run with the logged `records`.

        The run is assumed to log its remaining steps at its interval.
        """
        losses = _complete(self.job, records)
        own = _by_window(losses)
        steps = np.arange(1, len(losses) + 1)
        planned = (steps % self.job.cadence.log == 0) | (steps == 1) | (steps == len(steps))
        ahead = np.isnan(own)[_windows(len(steps))]
        # In windows ahead, the difference from zero is the loss of the earlier runs
        compared = np.where(ahead & planned, 0.0, losses)
        apart = np.stack([_by_window(compared - run.losses) for run in self.earlier])
        mean, width = _spread(apart)
        return Expected(own, np.nan_to_num(own) - mean, width)

    def verdict(self, records: Iterable[MetricsRecord]) -> Verdict:
        """Return the verdict on the run so far, from its logged `records`."""
        own, mean, width = self.expected(records)
        apart = own - mean
        beyond = np.sign(apart) * np.maximum(np.abs(apart) - width, 0)
        compared, judged = (np.flatnonzero(~np.isnan(x)) for x in (apart, beyond))
        found = Verdict(
            earlier=len(self.earlier),
            tokens=round(self.ends[compared[-1]]) if compared.size else 0,
            apart=float(apart[compared[-1]]) if compared.size else 0.0,
            judged=judged.size > 0,
        )
        out = judged[beyond[judged] != 0]
        if not out.size:
            return found
        return found.replace(
            since=round(self.ends[out[0]] - self.ends[0]),
            until=None if out[-1] == judged[-1] else round(self.ends[out[-1]]),
            distance=float(max(beyond[out], key=abs)),
        )


def find(job: TrainingJob) -> Band | None:
    """Return the band of the earlier runs in the cache of `job`; None if there are none.

    Earlier runs started before this one and have the same model, data, batch, schedule and
    optimiser. Unfinished runs count up to their last complete window. Of several runs with the same
    seed, the longest counts, or the newest of those with equal length. An extended run is not
    compared, because its schedule changed, nor is one that diverged or left out data.
    """
    before = _began(job)
    if before is None:
        return None
    by_seed: dict[int, EarlierRun] = {}
    for folder in job.folder.cache.existing_runs():
        if folder.name == job.folder.name or not folder.job.exists():
            continue
        try:
            run = _earlier(folder, job, before)
        except (OSError, ValueError, LookupError, TypeError) as error:
            # The earlier run is damaged, or of another version. That must not end this run
            log.debug("run %s is not part of the expected loss: %s", folder.name, error)
            continue
        if run is not None:
            by_seed[run.seed] = max(run, by_seed.get(run.seed, run), key=EarlierRun.weight)
    if not by_seed:
        return None
    return Band(job, tuple(sorted(by_seed.values(), key=lambda run: run.began)))


def _earlier(folder: RunFolder, job: TrainingJob, before: float) -> EarlierRun | None:
    """Read the run in `folder`; None if `job` cannot be compared with it."""
    past = TrainingJob.read(folder.job).replace(run_dir=folder.path)
    if _decisive(past) != _decisive(job):
        return None
    began = _began(past)
    if began is None or began >= before or _diverged(folder):
        return None
    losses = _complete(past, METRICS.read(folder.metrics))
    if np.isnan(losses).all():
        return None
    return EarlierRun(folder.name, past.training.seed, began, losses)


def _diverged(folder: RunFolder) -> bool:
    last = EVENTS.read(folder.events)[-1:]
    ended = bool(last) and isinstance(last[0], Failed) and last[0].reason == "diverged"
    return ended or any(entry.skip for entry in recovery.read(folder))


def _decisive(job: TrainingJob) -> tuple[Any, ...]:
    """Return everything that determines the loss curve, except seed and rounding."""
    training = job.training
    settings = training.model_dump(exclude={"seed", "workload"})
    # The name of the folder contains a fingerprint of corpus, tokenizer and row layout
    data = (job.shards.path.name, job.shards.parts, job.initial and job.initial.name)
    return (settings, training.workload.mathematics, *data)


def _began(job: TrainingJob) -> float | None:
    """Return the start time of training, infinite if not started; None for an extended run."""
    starts = [event for event in EVENTS.read(job.folder.events) if isinstance(event, Started)]
    if any(start.steps != job.training.steps for start in starts):
        return None
    return starts[0].time if starts else math.inf


def _windows(steps: int) -> npt.NDArray[np.int64]:
    """Return the window of every step."""
    return (np.arange(1, steps + 1) * _WINDOWS - 1) // steps


def _complete(job: TrainingJob, records: Iterable[MetricsRecord]) -> Losses:
    """Return the training loss by step; NaN for steps not logged, or in an incomplete window."""
    losses = np.full(job.training.steps, np.nan)
    last = 0
    for record in records:
        if isinstance(record, StepRecord):
            losses[record.step - 1] = record.loss
            last = record.step
    losses[_windows(len(losses)) >= last * _WINDOWS // len(losses)] = np.nan
    return losses


def _by_window(losses: Losses) -> Losses:
    """Return the mean of the losses in every window."""
    there = ~np.isnan(losses)
    windows = _windows(len(losses))[there]
    counts = np.bincount(windows, minlength=_WINDOWS)
    sums = np.bincount(windows, losses[there], minlength=_WINDOWS)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def _spread(curves: npt.NDArray[np.float64]) -> tuple[Losses, Losses]:
    """Return the mean of the curves (one per row), and the half-width of the band around it."""
    runs = np.count_nonzero(~np.isnan(curves), axis=0)
    mean = np.nansum(curves, axis=0) / np.where(runs, runs, np.nan)
    squares = np.nansum((curves - mean) ** 2, axis=0)
    freedom = np.maximum(runs - 1, 0)
    width = np.full(_WINDOWS, np.nan)
    for window in map(int, np.flatnonzero(runs >= _FEWEST)):
        first = min(max(window - _POOLED // 2, 0), _WINDOWS - _POOLED)
        near = slice(first, first + _POOLED)
        pooled = freedom[near].sum()
        t = student(1 - (1 - _HELD) / _WINDOWS, max(pooled / 2, freedom[window]))
        width[window] = t * math.sqrt(squares[near].sum() / pooled * (1 + 1 / runs[window]))
    return mean, width
