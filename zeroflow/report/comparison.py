"""Comparison of the runs of a sweep, and the loss that they predict for a larger model.

A power law of the compute, L = A · C^-b, is fitted to the best loss of every size:
https://arxiv.org/abs/2001.08361
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import computed_field

from zeroflow.markup import Markdown, bold, code, escaped, table
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.records import Record
from zeroflow.report.pages import Page, Picture
from zeroflow.report.records import RunReport, Sharding
from zeroflow.run_folder import Cache
from zeroflow.settings.settle import load
from zeroflow.training import metrics
from zeroflow.training.metrics import METRICS, TABLE, Metric, ValidationRecord
from zeroflow.units import binary, duration, parameter_count, speed


class Outcome(Sharding):
    """Outcome of one run."""

    run: str
    size: str
    seed: int
    learning_rate: float
    parameters: int
    vocabulary: int
    context: int
    flops_per_token: int
    tokens: int
    val_loss: float
    """Nats per token."""

    val_bpb: float | None
    tokens_per_second: float | None
    seconds: float
    """Training seconds from which tokens per second are computed."""

    peak_memory_bytes: int
    """Peak memory of each GPU."""

    curve: tuple[tuple[int, float], ...]
    """Tokens and validation loss at every validation."""

    metrics: dict[str, float] = {}  # noqa: RUF012, pydantic copies it
    """Last logged values of the compared metrics, by key in MLflow."""

    @property
    def shape(self) -> str:
        """Name of the size; a custom shape is identified by its number of parameters."""
        if self.size in SIZES:
            return self.size
        return f"{self.size} of {parameter_count(self.parameters)} parameters"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops(self) -> float:
        """FLOPs of the whole training; a float, because the number may exceed 2^63."""
        return float(self.flops_per_token) * self.tokens


def outcome(cache: Path, name: str) -> Outcome | None:
    """Return the outcome of run `name`; None if the run failed or has not ended.

    Raises:
        ValueError: the report of the run cannot be read.
    """
    folder = Cache(cache).run(name)
    report = RunReport.read_if_exists(folder.report)
    if report is None or report.status != "completed":
        return None
    settings = load(cache, name)
    vocabulary = report.tokenizer.vocab_size
    model = with_vocabulary(settings.model.shape, vocabulary)
    context = settings.shard_config.seq_len
    records = METRICS.read(folder.metrics)
    validations = [record for record in records if isinstance(record, ValidationRecord)]
    latest = metrics.latest(records)
    return Outcome(
        **dict(report.sharding),
        run=name,
        size=report.size,
        seed=settings.seed,
        learning_rate=settings.schedule.peak,
        parameters=report.parameters,
        vocabulary=vocabulary,
        context=context,
        flops_per_token=model.flops_per_token(context),
        tokens=report.tokens,
        val_loss=report.val_loss,
        val_bpb=report.val_bpb,
        tokens_per_second=report.tokens_per_second,
        seconds=report.time.training_seconds,
        peak_memory_bytes=report.peak_memory_bytes,
        curve=tuple((record.tokens, record.val_loss) for record in validations),
        metrics={m.key: latest[m.key] for m in _COMPARED if m.key in latest},
    )


_COMPARED = [metric for metric in TABLE.values() if metric.compared]


class PowerLaw(Record):
    """log L = log A - b · log C, by least squares."""

    log_a: float
    b: float
    covariance: tuple[tuple[float, ...], ...] | None
    """Covariance of b and log A; None if the law has only two points, which fit exactly."""

    points: int

    @classmethod
    def fitted(cls, flops: Sequence[float], losses: Sequence[float]) -> Self | None:
        """Fit the law; None for fewer than two different amounts of compute."""
        x, y = np.log(np.array(flops)), np.log(np.array(losses))
        if len(set(flops)) < 2:
            return None
        (slope, log_a), *_ = np.polyfit(x, y, 1, full=True)
        covariance = None
        if len(x) > 2:
            design = np.stack([x, np.ones_like(x)], axis=1)
            variance = float(((y - design @ [slope, log_a]) ** 2).sum() / (len(x) - 2))
            spread = variance * np.linalg.inv(design.T @ design)
            covariance = tuple(map(tuple, spread.tolist()))
        return cls(log_a=float(log_a), b=-float(slope), covariance=covariance, points=len(x))

    def loss(self, flops: float) -> float:
        return math.exp(self.log_a - self.b * math.log(flops))

    def factor(self, flops: float) -> float | None:
        """Factor for one standard error of the predicted loss, up or down."""
        if self.covariance is None:
            return None
        x = np.array([math.log(flops), 1.0])
        return math.exp(math.sqrt(max(0.0, float(x @ np.array(self.covariance) @ x))))

    @property
    def b_error(self) -> float | None:
        return None if self.covariance is None else math.sqrt(max(0.0, self.covariance[0][0]))


class Prediction(Record):
    """Loss that the law predicts for a training."""

    size: str
    flops: float
    loss: float
    factor: float | None
    measured: float | None
    """Best measured loss of that size; None if it was not trained."""


class Comparison(Record):
    """The runs of a sweep: comparison.json."""

    runs: list[Outcome]
    law: PowerLaw | None
    """Law fitted to all sizes; None for fewer than two."""

    next_size: Prediction | None
    """Prediction for the next larger size, by the law of all sizes."""

    largest: Prediction | None
    """Prediction for the largest size, by the law of the smaller ones."""


def compare(outcomes: Iterable[Outcome]) -> Comparison:
    """Fit the law to the best run of every size, and predict from it."""

    def order(one: Outcome) -> tuple[int, float]:
        return one.parameters, math.inf if math.isnan(one.val_loss) else one.val_loss

    found = sorted(outcomes, key=order)
    best: dict[str, Outcome] = {}
    for one in found:
        if math.isfinite(one.val_loss):
            best.setdefault(one.shape, one)
    sizes = sorted(best.values(), key=lambda one: one.flops)
    law = _law(sizes)
    before = _law(sizes[:-1]) if len(sizes) > 2 else None
    largest = before and _predicted(before, sizes[-1].shape, sizes[-1].flops, sizes[-1].val_loss)
    return Comparison(runs=found, law=law, next_size=law and _next(law, sizes), largest=largest)


def _law(sizes: list[Outcome]) -> PowerLaw | None:
    return PowerLaw.fitted([one.flops for one in sizes], [one.val_loss for one in sizes])


def _predicted(law: PowerLaw, size: str, flops: float, measured: float | None) -> Prediction:
    return Prediction(
        size=size, flops=flops, loss=law.loss(flops), factor=law.factor(flops), measured=measured
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


_OF_GPUS = ("GPUs", "ZeRO")


def page(sweep: str, found: Comparison, *, pictures: Sequence[Path], failed: list[str]) -> Page:
    """Return the page of a sweep as Markdown.

    Args:
        sweep: name of the sweep, the prefix of its runs' names.
        failed: names of the runs that failed.
    """
    columns = {
        "run": [one.run.removeprefix(f"{sweep}-") for one in found.runs],
        "size": [one.size for one in found.runs],
        **{metric.label: [_cell(metric, one) for one in found.runs] for metric in _COMPARED},
        "seed": [str(one.seed) for one in found.runs],
        "GPUs": [str(one.ranks) for one in found.runs],
        "ZeRO": ["none" if one.ranks == 1 else str(one.zero_stage) for one in found.runs],
        "peak rate": [f"{one.learning_rate:g}" for one in found.runs],
        "parameters": [parameter_count(one.parameters) for one in found.runs],
        "tokens": [parameter_count(one.tokens) for one in found.runs],
        "FLOPs": [f"{one.flops:.3g}" for one in found.runs],
        "hours": [f"{one.seconds / 3600:.3g}" for one in found.runs],
        "tokens/s": [speed(one.tokens_per_second).removesuffix(" tokens/s") for one in found.runs],
        "memory": [binary(one.peak_memory_bytes) for one in found.runs],
    }
    if all(one.ranks == 1 for one in found.runs):
        columns = {name: cells for name, cells in columns.items() if name not in _OF_GPUS}
    if columns["run"] == columns["size"]:
        del columns["size"]
    # Columns with equal values go into a sentence: Prefect's page is too narrow for all
    alike = {
        column: cells[0]
        for column, cells in columns.items()
        if len(cells) > 1 and len(set(cells)) == 1 and column != TABLE["val_loss"].label
    }
    shown = {column: cells for column, cells in columns.items() if column not in alike}
    right = "".join(" " if column in ("run", "size") else "r" for column in shown)
    spent = duration(sum(one.seconds for one in found.runs))
    begin = code(f"{sweep}-")
    parts: list[Markdown | Picture] = [
        Markdown(f"# Sweep {escaped(sweep)}"),
        Markdown(f"{len(found.runs)} runs, {spent} of training. Their names begin with {begin}."),
        table(list(shown), zip(*shown.values(), strict=True), right=right),
    ]
    if alike:
        parts.append(escaped(f"Common to all runs: {', '.join(map(' '.join, alike.items()))}."))
    if failed:
        named = bold(f"Not finished: {', '.join(failed)}")
        parts.append(Markdown(f"{named}. Repeat the command, or retry in Prefect, to resume them."))
    parts += [Picture(picture, picture.name) for picture in pictures]
    if sentences := list(_sentences(found)):
        parts += [Markdown("## Power law"), *map(escaped, sentences)]
    return Page(tuple(parts))


def _cell(metric: Metric, one: Outcome) -> str:
    value = one.metrics.get(metric.key)
    return "none" if value is None else format(value, metric.form)


def _sentences(found: Comparison) -> Iterable[str]:
    law = found.law
    if law is None:
        return
    error = "" if law.b_error is None else f" ± {law.b_error:.2g}"
    yield (
        f"L = {math.exp(law.log_a):.4g} · C^{-law.b:.4f}{error}, fitted to the best run of each of "
        f"{law.points} sizes, where C is the number of FLOPs of a training"
        + (
            ". ± is one standard error."
            if law.b_error is not None
            else ". Two points give no error estimate."
        )
    )
    if found.next_size:
        sentence = f"Next size: {_described(found.next_size)}"
        yield f"{sentence}, with as many tokens per parameter as the largest size."
    if found.largest and found.largest.measured is not None:
        miss = found.largest.measured / found.largest.loss - 1
        yield (
            f"Test of the law: the smaller sizes alone predict {_described(found.largest)}. The "
            f"measured loss was {found.largest.measured:.4f}, a difference of {miss:+.2%}."
        )


def _described(prediction: Prediction) -> str:
    factor = prediction.factor
    between = ""
    if factor is not None:
        between = f" ({prediction.loss / factor:.4f} to {prediction.loss * factor:.4f})"
    return f"{prediction.size}, {prediction.flops:.3g} FLOPs: loss {prediction.loss:.4f}{between}"
