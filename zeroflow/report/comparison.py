"""Comparison of the runs of a sweep, and the loss that they predict for a larger model."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.records import Record
from zeroflow.report.outcome import Measure, Outcome
from zeroflow.report.power_law import Interval, PowerLaw


class Mean(NamedTuple):
    """A figure of several runs that differ only in their seeds."""

    mean: float
    deviation: float
    """Standard deviation of a single run."""


def _mean(values: Sequence[float]) -> Mean:
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)))


class Group(NamedTuple):
    """Runs that differ only in their seeds."""

    name: str
    runs: tuple[Outcome, ...]

    @property
    def completed(self) -> tuple[Outcome, ...]:
        return tuple(one for one in self.runs if one.status == "completed")

    def mean(self, measure: Measure) -> Mean | None:
        """Return the mean over the completed runs; None for fewer than two, or without values."""
        values = [getattr(one, measure) for one in self.completed]
        if len(values) < 2 or None in values:
            return None
        return _mean(values)

    def curve(self, measure: Measure) -> list[tuple[int, Mean]]:
        """Return the mean over the completed runs at each token count at which all validated."""
        curves = [dict(one.points(measure)) for one in self.completed]
        if len(curves) < 2:
            return []
        common = sorted(set.intersection(*map(set, curves)))
        return [(tokens, _mean([curve[tokens] for curve in curves])) for tokens in common]


class Prediction(Record):
    """Loss that the law predicts for a run."""

    size: str
    flops: float
    loss: float
    interval: Interval | None
    """Interval that should contain 95 % of such runs; None for too few points."""

    measured: float | None
    """Best measured loss of that size; None if it was not trained."""


class Comparison(Record):
    """The runs of a sweep: comparison.json."""

    runs: list[Outcome]
    measure: Measure = "val_loss"
    """Field that is compared: bits per byte if tokenizers differ."""

    law: PowerLaw | None
    """Law fitted to all sizes; None for fewer than two."""

    next_size: Prediction | None
    """Prediction for the next larger size, by the law of all sizes."""

    largest: Prediction | None
    """Prediction for the largest size, by the law of the smaller ones."""

    @property
    def groups(self) -> list[Group]:
        """The runs in their order, grouped with those that differ only in their seeds."""
        together: dict[tuple[str, ...], list[Outcome]] = {}
        for one in self.runs:
            key = (one.setting, one.shape, one.extended) if one.setting else (one.run,)
            together.setdefault(key, []).append(one)
        return [Group(_name(runs), tuple(runs)) for runs in together.values()]

    @property
    def mixes_tokenizers(self) -> bool:
        return len({one.tokenizer for one in self.runs}) > 1


def _name(runs: list[Outcome]) -> str:
    """Return the common name of the runs, without a seed in it."""
    names = {one.run.replace(f"-seed{one.seed}", "") for one in runs}
    return names.pop() if len(names) == 1 else f"{runs[0].run} and {len(runs) - 1} more"


def compare(outcomes: Iterable[Outcome]) -> Comparison:
    """Fit the law to the best completed run of every size, and predict from it.

    If the runs have different tokenizers, they are compared by bits per byte, because losses per
    token are not comparable.
    """
    runs = list(outcomes)
    measure: Measure = "val_bpb" if len({one.tokenizer for one in runs}) > 1 else "val_loss"

    def value(one: Outcome) -> float:
        found = getattr(one, measure)
        return math.inf if found is None or math.isnan(found) else float(found)

    found = sorted(runs, key=lambda one: (one.parameters, value(one)))
    best: dict[str, Outcome] = {}
    for one in found:
        if math.isfinite(value(one)) and one.status == "completed":
            best.setdefault(one.shape, one)
    sizes = sorted(best.values(), key=lambda one: one.flops)
    points = [(one.flops, value(one)) for one in sizes]
    law, before = _law(points), _law(points[:-1]) if len(points) > 2 else None
    largest = before and _predicted(before, sizes[-1].shape, *points[-1])
    return Comparison(
        runs=found,
        measure=measure,
        law=law,
        next_size=law and _next(law, sizes),
        largest=largest,
    )


def _law(points: list[tuple[float, float]]) -> PowerLaw | None:
    flops, losses = zip(*points, strict=True) if points else ((), ())
    return PowerLaw.fitted(flops, losses)


def _predicted(law: PowerLaw, size: str, flops: float, measured: float | None) -> Prediction:
    return Prediction(
        size=size,
        flops=flops,
        loss=law.loss(flops),
        interval=law.interval(flops),
        measured=measured,
    )


_STEP = 4
"""Factor from the largest size to the next; medium has about four times the parameters of small."""


def _next(law: PowerLaw, sizes: list[Outcome]) -> Prediction:
    """Predict the loss of the next larger size, with the tokens per parameter of the largest."""
    last = max(sizes, key=lambda one: one.parameters)
    for name, shape in SIZES.items():
        model = with_vocabulary(shape, last.vocabulary)
        if model.parameters > last.parameters:
            tokens = last.tokens * model.parameters / last.parameters
            return _predicted(law, name, tokens * model.flops_per_token(last.context), None)
    larger = f"a model with {_STEP} times the parameters of {last.shape}"
    return _predicted(law, larger, _STEP**2 * last.flops, None)
