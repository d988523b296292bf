"""Runs beside each other: their losses, and what these say of a model that is larger.

A power law of the compute, L = A · C^-b, is fitted to the best loss of every size:
https://arxiv.org/abs/2001.08361
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from zeroflow import artifacts, records
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.run_folder import Cache
from zeroflow.settings.settle import load
from zeroflow.units import binary, duration, parameter_count, speed


class Outcome(NamedTuple):
    """How one run ended."""

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
    """Of training, as tokens per second are over."""

    ranks: int
    zero_stage: int
    peak_memory_bytes: int
    """Of each GPU."""

    curve: tuple[tuple[int, float], ...]
    """Tokens and validation loss at every validation."""

    @property
    def shape(self) -> str:
        """The name of its size; a shape of one's own is told by its number of parameters."""
        if self.size in SIZES:
            return self.size
        return f"{self.size} of {parameter_count(self.parameters)} parameters"

    @property
    def flops(self) -> float:
        """Of the whole training, as a float: they may be more than 2^63."""
        return float(self.flops_per_token) * self.tokens


def outcome(cache: Path, name: str) -> Outcome | None:
    """How run `name` ended; None if it has not, or failed."""
    folder = Cache(cache).run(name)
    if not folder.report.exists():
        return None
    found = artifacts.read_json(folder.report)
    if found["status"] != "completed":
        return None
    settings = load(cache, name)
    vocabulary = found["tokenizer"]["vocab_size"]
    model = with_vocabulary(settings.model.shape, vocabulary)
    context = settings.shard_config.seq_len
    lines = records.read(folder.metrics)
    return Outcome(
        run=name,
        size=found["size"],
        seed=settings.seed,
        learning_rate=settings.schedule.peak,
        parameters=found["parameters"],
        vocabulary=vocabulary,
        context=context,
        flops_per_token=model.flops_per_token(context),
        tokens=found["tokens"],
        val_loss=found["val_loss"],
        val_bpb=found["val_bpb"],
        tokens_per_second=found["tokens_per_second"],
        seconds=found["time"]["training_seconds"],
        ranks=settings.ranks,
        zero_stage=settings.training.zero_stage,
        peak_memory_bytes=found["peak_memory_bytes"],
        curve=tuple((line["tokens"], line["val_loss"]) for line in lines if "val_loss" in line),
    )


class PowerLaw(NamedTuple):
    """log L = log A - b · log C, by least squares."""

    log_a: float
    b: float
    covariance: tuple[tuple[float, ...], ...] | None
    """Of b and log A; None where the law goes through its two points exactly."""

    points: int

    @classmethod
    def fitted(cls, flops: Sequence[float], losses: Sequence[float]) -> Self | None:
        """None for fewer than two different amounts of compute."""
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
        return cls(float(log_a), -float(slope), covariance, len(x))

    def loss(self, flops: float) -> float:
        return math.exp(self.log_a - self.b * math.log(flops))

    def factor(self, flops: float) -> float | None:
        """By which the loss may be larger or smaller, at one standard error of the law."""
        if self.covariance is None:
            return None
        x = np.array([math.log(flops), 1.0])
        return math.exp(math.sqrt(max(0.0, float(x @ np.array(self.covariance) @ x))))

    @property
    def b_error(self) -> float | None:
        return None if self.covariance is None else math.sqrt(max(0.0, self.covariance[0][0]))


class Prediction(NamedTuple):
    size: str
    flops: float
    loss: float
    factor: float | None
    measured: float | None
    """The best loss of that size, where it has been trained."""


class Comparison(NamedTuple):
    outcomes: list[Outcome]
    law: PowerLaw | None
    """Of all sizes."""

    next_size: Prediction | None
    """By the law of all sizes."""

    largest: Prediction | None
    """By the law of all sizes but the largest: what would have been said before it was trained."""


def compare(outcomes: Iterable[Outcome]) -> Comparison:
    """The law of the best run of every size, and its predictions."""

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
    return Comparison(found, law, law and _next(law, sizes), largest)


def _law(sizes: list[Outcome]) -> PowerLaw | None:
    return PowerLaw.fitted([one.flops for one in sizes], [one.val_loss for one in sizes])


def _predicted(law: PowerLaw, size: str, flops: float, measured: float | None) -> Prediction:
    return Prediction(size, flops, law.loss(flops), law.factor(flops), measured)


_STEP = 4
"""From medium on, the next size has so many times the parameters, as it has of small."""


def _next(law: PowerLaw, sizes: list[Outcome]) -> Prediction:
    """Of the smallest size above all that were trained, at as many tokens a parameter."""
    last = max(sizes, key=lambda one: one.parameters)
    for name, shape in SIZES.items():
        model = with_vocabulary(shape, last.vocabulary)
        if model.parameters > last.parameters:
            tokens = last.tokens * model.parameters / last.parameters
            return _predicted(law, name, tokens * model.flops_per_token(last.context), None)
    larger = f"{_STEP} times the parameters of {last.shape}"
    return _predicted(law, larger, _STEP**2 * last.flops, None)


_OF_GPUS = ("GPUs", "ZeRO")


def markdown(sweep: str, found: Comparison, *, pictures: Sequence[str], failed: list[str]) -> str:
    """The page of a sweep, by its name; those of its runs begin with it."""
    columns = {
        "run": [one.run.removeprefix(f"{sweep}-") for one in found.outcomes],
        "size": [one.size for one in found.outcomes],
        "validation loss": [f"{one.val_loss:.4f}" for one in found.outcomes],
        "bits per byte": [
            "none" if one.val_bpb is None else f"{one.val_bpb:.4f}" for one in found.outcomes
        ],
        "seed": [str(one.seed) for one in found.outcomes],
        "GPUs": [str(one.ranks) for one in found.outcomes],
        "ZeRO": ["none" if one.ranks == 1 else str(one.zero_stage) for one in found.outcomes],
        "peak rate": [f"{one.learning_rate:g}" for one in found.outcomes],
        "parameters": [parameter_count(one.parameters) for one in found.outcomes],
        "tokens": [parameter_count(one.tokens) for one in found.outcomes],
        "FLOPs": [f"{one.flops:.3g}" for one in found.outcomes],
        "hours": [f"{one.seconds / 3600:.3g}" for one in found.outcomes],
        "tokens/s": [
            speed(one.tokens_per_second).removesuffix(" tokens/s") for one in found.outcomes
        ],
        "memory": [binary(one.peak_memory_bytes) for one in found.outcomes],
    }
    if all(one.ranks == 1 for one in found.outcomes):
        columns = {name: cells for name, cells in columns.items() if name not in _OF_GPUS}
    if columns["run"] == columns["size"]:
        del columns["size"]
    # Prefect's page is too narrow for all of them
    alike = {
        column: cells[0]
        for column, cells in columns.items()
        if len(cells) > 1 and len(set(cells)) == 1 and column != "validation loss"
    }
    shown = {column: cells for column, cells in columns.items() if column not in alike}
    rule = ["---" if column in ("run", "size") else "---:" for column in shown]
    table = [list(shown), rule, *zip(*shown.values(), strict=True)]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    spent = duration(sum(one.seconds for one in found.outcomes))
    said = f"{len(found.outcomes)} runs, {spent} of training; their names begin with `{sweep}-`."
    parts = [f"# Sweep {sweep}", said, lines]
    if alike:
        parts.append(f"The same for all: {', '.join(map(' '.join, alike.items()))}.")
    if failed:
        again = "the same command, or a retry, goes on with them"
        parts.append(f"**Not finished: {', '.join(failed)}**; {again}.")
    parts += [f"![{picture}]({picture})" for picture in pictures]
    if sentences := list(_sentences(found)):
        parts += ["## Power law", *sentences]
    return "\n\n".join(parts) + "\n"


def _sentences(found: Comparison) -> Iterable[str]:
    law = found.law
    if law is None:
        return
    error = "" if law.b_error is None else f" ± {law.b_error:.2g}"
    yield (
        f"L = {math.exp(law.log_a):.4g} · C^{-law.b:.4f}{error}, C the FLOPs of a training, "
        f"through the best run of each of {law.points} sizes"
        + (
            "; ± is one standard error."
            if law.b_error is not None
            else ": two points leave no error to be known."
        )
    )
    if found.next_size:
        yield f"Next size: {_said(found.next_size)}, at as many tokens a parameter as the largest."
    if found.largest and found.largest.measured is not None:
        miss = found.largest.measured / found.largest.loss - 1
        yield (
            f"Looking back: the smaller sizes alone foretell {_said(found.largest)}; it was "
            f"{found.largest.measured:.4f}, {miss:+.2%}."
        )


def _said(prediction: Prediction) -> str:
    factor = prediction.factor
    between = ""
    if factor is not None:
        between = f" ({prediction.loss / factor:.4f} to {prediction.loss * factor:.4f})"
    return f"{prediction.size} at {prediction.flops:.3g} FLOPs, loss {prediction.loss:.4f}{between}"


def figures(found: Comparison) -> dict[str, Any]:
    """All of it as JSON holds it."""
    return {
        "runs": [one._asdict() | {"flops": one.flops} for one in found.outcomes],
        "law": found.law._asdict() if found.law else None,
        "next_size": found.next_size._asdict() if found.next_size else None,
        "largest": found.largest._asdict() if found.largest else None,
    }
