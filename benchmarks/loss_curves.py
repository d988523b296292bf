"""Compare the loss curves of one training that is computed in several ways.

`plain` follows the formulas: fp32, eager, with attention and cross-entropy written out. `fast` is
the default of a run on the device, with the fastest kernels, and `fp8` adds --fp8. All start from
the same weights and read the same rows of the sample, the source files of Python's standard
library, in the same order.
"""

import argparse
import gc
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeroflow.data.batches import IGNORED, Batches
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.data.tokenizer import TokenizerConfig, resolve_tokenizer
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.device import Device, find_device
from zeroflow.model import llama
from zeroflow.model.attention import AttentionKernel
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.training import batching, kernels
from zeroflow.training.config import TrainingConfig
from zeroflow.training.kernels import Kernels
from zeroflow.training.loop import train
from zeroflow.training.schedule import Schedule
from zeroflow.training.state import new_state
from zeroflow.training.workload import Workload

log = logging.getLogger(__name__)

_SHOWN = 6
"""Number of steps in the table."""

_WINDOWS = 20
"""A curve is smoothed over a window of its length divided by this."""

Figures = dict[str, Any]


class Task(NamedTuple):
    """Data and batches of a training run."""

    vocab_size: int
    """Vocabulary size of the tokenizer."""

    context: int
    rows: int
    """Rows of a micro-batch."""

    accumulate: int
    """Micro-batches of a step."""

    seed: int


class Work(NamedTuple):
    """Model, settings and rows of a training run."""

    training: TrainingConfig
    """Default settings of a run on the device."""

    shards: ShardSet
    all_in_fp8: bool = False
    """If True, `fp8` uses all kernels for fp8, and not only those that are the fastest."""

    tf32: bool = False
    """Compute the products of `plain` in TF32."""

    @property
    def batches(self) -> Batches:
        return batching.batches(Rows(self.shards, "train"), self.training)

    def computed(self, **how: Any) -> TrainingConfig:
        return self.training.replace(workload=self.training.workload.replace(**how))


class Curve(NamedTuple):
    """A training run in one of the ways."""

    losses: Iterator[Tensor]
    """Loss of each step, on the device."""

    kernels: Kernels | None = None
    """None if everything is written out."""


# The ways to compute it


def plain(work: Work) -> Curve:
    return Curve(_plain_losses(work))


def _plain_losses(work: Work) -> Iterator[Tensor]:
    config = work.computed(precision="fp32", compile=False)
    state, batches = new_state(config), work.batches
    with patch.object(llama, "attend", attention):
        while state.step < config.steps:
            learning_rate = config.schedule.learning_rate(state.step)
            config.workload.optimizer.set_learning_rate(state.optimizer, learning_rate)
            micro_batches = batches.micro_batches(state.step)
            valid = sum(batch.valid for batch in micro_batches)
            losses = []
            for batch in micro_batches:
                inputs, targets = (x.to(config.workload.device) for x in batch[:2])
                logits = state.model(inputs).flatten(0, 1)
                total = F.cross_entropy(
                    logits, targets.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                loss = total / valid
                loss.backward()
                losses.append(loss.detach())
            nn.utils.clip_grad_norm_(
                state.model.parameters(), config.workload.optimizer.max_grad_norm
            )
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step += 1
            yield torch.stack(losses).sum()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: None, kernel: AttentionKernel = "cudnn"
) -> Tensor:
    """softmax(q kᵀ / √E) v of queries (B, H, T, E) and keys and values (B, K, T, E), causal."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, H, T, T)
    later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v


def fast(work: Work, **prescribed: str) -> Curve:
    config = work.training
    with tempfile.TemporaryDirectory(prefix="zeroflow-kernels-") as folder:
        chosen = kernels.choose(config.workload, Path(folder), z_loss=config.z_loss)
    chosen = chosen.replace(**prescribed)
    config = config.replace(kernels=chosen)
    steps = train(new_state(config), work.batches, config)
    return Curve((metrics.loss for metrics in steps), chosen)


def fp8(work: Work) -> Curve:
    training = work.computed(precision="bf16", fp8=True)
    prescribed = {"feed_forward": "fused", "loss": "rounded"} if work.all_in_fp8 else {}
    return fast(work._replace(training=training), **prescribed)


WAYS: dict[str, Callable[[Work], Curve]] = {"plain": plain, "fast": fast, "fp8": fp8}


def measure(way: str, work: Work) -> Figures:
    """Loss of every step, and the seconds of all steps, compilation included."""
    gc.collect()
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high" if work.tf32 and way == "plain" else "highest")
    curve = WAYS[way](work)
    started = time.perf_counter()
    losses = torch.stack(list(curve.losses)).tolist()  # waits for the device only once
    return {
        "losses": losses,
        "seconds": time.perf_counter() - started,
        "kernels": curve.kernels and curve.kernels.model_dump(),
    }


def obstacle(way: str, work: Work, device: Device) -> str | None:
    """Reason why the device cannot compute this way; None if it can."""
    if way == "fp8":
        try:
            work.computed(precision="bf16", fp8=True).workload.require_possible_on(device)
        except ValueError as error:
            return str(error)
    return None


# The training


def prepare(
    corpus: CorpusConfig,
    cache: Path,
    device: Device,
    size: str,
    task: Task,
    schedule: Schedule,
) -> Work:
    """Prepare a training run on `corpus`, with tokenizer and shards in `cache`."""
    corpus = resolve_corpus(corpus).corpus
    asked = TokenizerConfig(vocab_size=task.vocab_size)
    tokenizer = fetch_tokenizer(resolve_tokenizer(asked, corpus, cache).tokenizer, corpus, cache)
    gpu = device.kind == "cuda"
    workload = Workload(
        device=device.kind,
        device_name=device.name,
        model=with_vocabulary(SIZES[size], tokenizer.vocab_size),
        seq_len=task.context,
        micro_batch_rows=task.rows,
        accumulate=task.accumulate,
        precision="bf16" if gpu else "fp32",
        compile=gpu,
    )
    training = TrainingConfig(seed=task.seed, workload=workload, schedule=schedule)
    train_rows = schedule.steps * task.rows * task.accumulate
    config = ShardConfig(seq_len=task.context, train_rows=train_rows, validation_rows=1)
    shards = build_shards(config, corpus, tokenizer, cache, seed=task.seed)
    return Work(training, shards)


# Comparison


def compare(ways: list[str], trained: Work, device: Device, settings: Figures) -> Iterator[Figures]:
    """Train in every way that the device supports; `absent` has the reasons for the others.

    Yields:
        The results so far, after each way.
    """
    absent = {way: why for way in ways if (why := obstacle(way, trained, device))}
    if ways[0] in absent:
        raise ValueError(
            f"{ways[0]}, the reference of the comparison, cannot run: {absent[ways[0]]}"
        )
    runs: dict[str, Figures] = {}
    for way in ways:
        if way not in absent:
            runs[way] = measure(way, trained)
            log.info("%s: loss %.4f", way, runs[way]["losses"][-1])
            yield {
                "device": device.model_dump(),
                "torch": torch.__version__,
                "settings": settings,
                "parameters": trained.training.workload.model.parameters,
                "absent": absent,
                "differences": differences(runs),
                "runs": runs,
            }


def smoothed(losses: list[float]) -> npt.NDArray[np.float64]:
    """Mean over the window that ends at each step, starting with the first full window."""
    window = max(1, len(losses) // _WINDOWS)
    return np.convolve(losses, np.full(window, 1 / window), "valid")


def differences(runs: dict[str, Figures]) -> dict[str, Figures]:
    """Differences of the smoothed curves from the first one, in nats."""
    first = smoothed(next(iter(runs.values()))["losses"])
    found = {}
    for way, facts in runs.items():
        apart = smoothed(facts["losses"]) - first
        place = int(np.abs(apart).argmax())
        found[way] = {
            "mean": float(apart.mean()),
            "largest": float(apart[place]),
            "at_step": place + len(facts["losses"]) - len(apart) + 1,
        }
    return found


def report(results: Figures) -> str:
    """The table in Markdown."""
    device, runs, settings = results["device"], results["runs"], results["settings"]
    first, *_ = runs
    ends = len(next(iter(runs.values()))["losses"])
    window = max(1, ends // _WINDOWS)
    shown = sorted({round(step) for step in np.geomspace(window, ends, _SHOWN)})
    head = ["", *(f"step {step:,}" for step in shown)]
    head += ["mean difference", "largest difference", "at step", "s"]
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = []
    for way, facts in runs.items():
        curve, apart = smoothed(facts["losses"]), results["differences"][way]
        row = [way, *(f"{curve[step - window]:.4f}" for step in shown)]
        if way == first:
            row += ["", "", ""]
        else:
            row += [f"{apart['mean']:+.5f}", f"{apart['largest']:+.5f}", f"{apart['at_step']:,}"]
        rows.append([*row, f"{facts['seconds']:.1f}"])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *rows])
    notes = "".join(
        f"{way}: {', '.join(f'{part} {kernel}' for part, kernel in facts['kernels'].items())}\n"
        for way, facts in runs.items()
        if facts["kernels"]
    )
    notes += "plain: products in TF32\n" if settings["tf32"] else ""
    notes += "".join(f"{way}: {reason}\n" for way, reason in results["absent"].items())
    return (
        f"{device['name']}, torch {results['torch']}; {settings['size']}, "
        f"{results['parameters']:,} parameters, {ends:,} steps of {settings['tokens_per_step']:,} "
        f"tokens, context {settings['context']:,}; losses in nats, means over the last {window:,} "
        f"steps; differences from {first}\n\n"
        f"{table}\n{notes}"
    )


def write(results: Figures, folder: Path) -> None:
    """Write the losses, the table and the picture to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=str) + "\n"
    (folder / "loss_curves.json").write_text(text, encoding="utf-8")
    (folder / "loss_curves.md").write_text(report(results), encoding="utf-8")
    draw(results, folder / "loss_curves.png")


def draw(results: Figures, file: Path) -> None:
    """Draw the curves, and below them their differences from the first one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    runs = results["runs"]
    first = smoothed(next(iter(runs.values()))["losses"])
    for (way, facts), style in zip(runs.items(), ("-", "--", ":"), strict=False):
        curve = smoothed(facts["losses"])
        steps = np.arange(len(facts["losses"]) - len(curve), len(facts["losses"])) + 1
        above.plot(steps, curve, style, label=way)
        below.plot(steps, curve - first, style)
    above.set(title=f"{results['settings']['size']} on {results['device']['name']}")
    above.set(ylabel="loss (nats per token)")
    above.legend()
    below.set(xlabel="step", ylabel=f"difference from {next(iter(runs))}")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(file)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first is the reference"
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (1000)")
    parser.add_argument("--tokens-per-step", type=int, default=4096, help="(4096)")
    parser.add_argument("--context", type=int, default=512, help="(512)")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch (those of a step)")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="peak learning rate (1e-3)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32_768, help="vocabulary of the tokenizer (32768)"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="products of plain in TF32, for larger models"
    )
    parser.add_argument(
        "--all-in-fp8",
        action="store_true",
        help="fp8 uses all kernels for fp8, also if others are faster",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--cache-dir", type=Path, default=Path("data_cache"))
    parser.add_argument("--out", type=Path, default=Path("data_cache/benchmarks/loss_curves"))
    return parser


def main() -> None:
    parser = flags()
    arguments = parser.parse_args()
    step_rows, rest = divmod(arguments.tokens_per_step, arguments.context)
    rows = arguments.rows or step_rows
    if rest or step_rows % rows:
        parser.error(
            f"--tokens-per-step {arguments.tokens_per_step} is not a multiple of --context "
            f"{arguments.context} x --rows {rows}"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = find_device(arguments.device)
    trained = prepare(
        CorpusConfig(data_mode="sample"),
        arguments.cache_dir,
        device,
        arguments.size,
        Task(
            arguments.vocab_size,
            arguments.context,
            rows=rows,
            accumulate=step_rows // rows,
            seed=arguments.seed,
        ),
        Schedule(
            name="cosine",
            peak=arguments.learning_rate,
            warmup_steps=min(arguments.steps // 10, 50),
            steps=arguments.steps,
        ),
    )
    trained = trained._replace(all_in_fp8=arguments.all_in_fp8, tf32=arguments.tf32)
    try:
        for results in compare(arguments.ways, trained, device, vars(arguments)):
            write(results, arguments.out)  # after each way, so that an interruption loses only one
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(report(results))


if __name__ == "__main__":
    main()
