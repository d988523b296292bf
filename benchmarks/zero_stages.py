"""Measure tokens per second and memory of each ZeRO stage, compared with one GPU and with peers.

Every rank trains as many rows per step as the single GPU, so two GPUs reach twice the tokens per
second if communication takes no time. All ranks train the same rows, so losses are those of one
GPU up to rounding. Each contender runs in processes of its own, one after another.
"""

import argparse
import gc
import json
import logging
import math
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from train_speed import Figures, Task, peak_bytes, training_config, wait
from zero_peers import PEERS, Step

from zeroflow import artifacts
from zeroflow.device import Device, find_device
from zeroflow.estimate.memory import memory
from zeroflow.model.llama import ActivationCheckpointing
from zeroflow.model.sizes import NOMINAL_VOCABULARY, SIZES, with_vocabulary
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.events import EVENTS, Done
from zeroflow.training.job import RankJob
from zeroflow.training.launch import launch
from zeroflow.training.loop import train_step
from zeroflow.training.rank_program import RankProgram
from zeroflow.training.state import new_state
from zeroflow.training.stopping import Stop
from zeroflow.training.workload import Workload
from zeroflow.training.zero import STAGES, Stage
from zeroflow.units import binary

log = logging.getLogger("zeroflow.benchmarks")

_FOUND = "found.json"

_LOSSES = 8
"""Steps whose losses are compared with those of one GPU. They are also the warm-up."""


def ours(config: TrainingConfig, stage: Stage) -> Step:
    state = new_state(config)
    return lambda micro_batches: train_step(state, micro_batches, config).loss


TRAINERS = {"ours": ours} | PEERS


class Contender(NamedTuple):
    trainer: str
    stage: Stage
    shard_group: int | None = None

    @property
    def name(self) -> str:
        if self.trainer == "ddp":
            return "DDP"
        prefix = "DeepSpeed " if self.trainer == "deepspeed" else ""
        groups = f" in groups of {self.shard_group}" if self.shard_group else ""
        return f"{prefix}stage {self.stage}{groups}"

    def of(self, work: Workload) -> Workload:
        """Return `work` with its stage and groups."""
        return work.replace(zero_stage=self.stage, shard_group=self.shard_group)


class StagesJob(RankJob):
    task: Task
    """Task of each rank."""

    contender: Contender


def measure(job: StagesJob) -> Figures:
    """Losses, speed and memory of a contender; the speed is measured in windows of `seconds`."""
    [rows] = job.task.rows
    trainer, stage, shard_group = job.contender
    work = job.contender.of(job.training.workload)
    batches = job.task.batches(rows)
    step = TRAINERS[trainer](job.training.replace(workload=work), stage)
    if work.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    turns = cycle(batches)

    def seconds_of(steps: int) -> float:
        wait(work.device)
        began = time.perf_counter()
        for _ in range(steps):
            step(next(turns))
        wait(work.device)
        return time.perf_counter() - began

    losses = [step(next(turns)).item() for _ in range(_LOSSES)]
    steps = zero.max_over_ranks(max(1, round(job.task.seconds / seconds_of(1))))
    windows = [seconds_of(steps) / steps for _ in range(job.task.windows)]
    seconds = statistics.median(windows)
    loss = step(batches[0]).item()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return {
        "ranks": work.ranks,
        "trainer": trainer,
        "stage": stage,
        "shard_group": shard_group,
        "seconds_per_step": seconds,
        "spread": (max(windows) - min(windows)) / seconds,
        "tokens_per_second": work.batch_tokens / seconds,
        "memory": zero.max_over_ranks(peak_bytes(work.device)),
        "losses": losses,
        "loss": loss,
    }


def work(job: StagesJob, stop: Stop) -> None:
    found = measure(job)
    if zero.rank() == 0:
        artifacts.write_json(job.run_dir / _FOUND, found)
        EVENTS.append(job.folder.events, Done())


def of_ranks(task: Task, ranks: int, contender: Contender) -> Figures:
    """Figures of a contender in processes of its own."""
    [rows] = task.rows
    training = training_config(task, rows)
    training = training.replace(workload=training.workload.replace(ranks=ranks))
    with tempfile.TemporaryDirectory(prefix="zeroflow-bench-") as folder:
        job = StagesJob(run_dir=Path(folder), training=training, task=task, contender=contender)
        job.write(job.folder.job)
        launch("zero_stages", job.folder.job, lambda event: None, ranks=ranks)
        found: Figures = artifacts.read_json(job.run_dir / _FOUND)
        return found


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Contenders on several ranks, in the order of the table."""
    stages = tuple(arguments.stages or STAGES)
    found = [Contender("ours", stage) for stage in stages]
    found += [
        Contender("ours", stage, group)
        for group in arguments.shard_groups
        for stage in stages
        if stage
    ]
    if "ddp" in arguments.peers:
        found.append(Contender("ddp", 0))
    if "deepspeed" in arguments.peers:
        found += [Contender("deepspeed", stage) for stage in stages if stage]
    return found


def compared(task: Task, arguments: argparse.Namespace, device: Device) -> list[Figures]:
    """Figures of one GPU and of each contender on several, with scaling and difference of losses,
    and for ours with predicted memory."""
    alone = of_ranks(task, 1, Contender("ours", 0))
    several = [(one, of_ranks(task, arguments.gpus, one)) for one in contenders(arguments)]
    for one, figures in ((Contender("ours", 0), alone), *several):
        what = one.name if figures["ranks"] > 1 else "one GPU"
        planned = memory(one.of(task.workload.replace(ranks=figures["ranks"])), device)
        figures |= {"size": task.size, "rows": task.rows[0]}
        if figures["trainer"] == "ours":
            figures["planned"] = planned._asdict()
        figures["scaling"] = figures["tokens_per_second"] / (
            figures["ranks"] * alone["tokens_per_second"]
        )
        pairs = zip(figures["losses"], alone["losses"], strict=True)
        figures["loss_difference"] = max(abs(mine - one) for mine, one in pairs)
        log.info(
            "%s, %d x %s, %s: %s tokens/s (%.0f %%), %s%s, losses differ by %.1e",
            *(task.size, figures["ranks"], device.name, what),
            f"{figures['tokens_per_second']:,.0f}",
            100 * figures["scaling"],
            binary(figures["memory"]),
            f", predicted {binary(planned.total)}" if "planned" in figures else "",
            figures["loss_difference"],
        )
    return [alone, *(found for _, found in several)]


def asked_task(arguments: argparse.Namespace, number: int, device: Device) -> Task:
    """The task of the size with this number on the command line."""
    rows = arguments.rows[number] if arguments.rows else 1
    workload = Workload(
        device=device.kind,
        device_name=device.name,
        model=with_vocabulary(SIZES[arguments.sizes[number]], arguments.vocab_size),
        seq_len=arguments.seq_len,
        micro_batch_rows=rows,
        accumulate=arguments.accumulate,
        precision=arguments.precision or ("bf16" if device.has_bf16 else "fp32"),
        fp8=arguments.fp8,
        compile=device.compiles and not arguments.no_compile,
        activation_checkpointing=arguments.recompute,
    )
    return Task(
        size=arguments.sizes[number],
        vocab_size=arguments.vocab_size,
        workload=workload,
        rows=(rows,),
        windows=arguments.windows,
        seconds=arguments.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="default: a GPU if there is one"
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=[])
    parser.add_argument(
        "--shard-groups",
        nargs="+",
        type=int,
        default=[],
        help="sizes of groups within which stages 1 to 3 shard, in addition to all GPUs",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="trainers to compare")
    parser.add_argument("--vocab-size", type=int, default=NOMINAL_VOCABULARY)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        default=[],
        help="rows of a micro-batch, one for each size (1)",
    )
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step (1)")
    parser.add_argument("--recompute", choices=get_args(ActivationCheckpointing), default="none")
    parser.add_argument("--precision", choices=("bf16", "fp32"))
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    if "deepspeed" in arguments.peers and find_spec("deepspeed") is None:
        parser.error(
            "--peers deepspeed: install it with DS_BUILD_OPS=0 pip install deepspeed==0.19.8"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    device = find_device(arguments.device or "auto")
    if device.kind == "cpu":  # also the threads of one rank alone, as in the laboratory
        threads = max(1, (os.cpu_count() or 1) // arguments.gpus)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    results = []
    for number in range(len(arguments.sizes)):
        results += compared(asked_task(arguments, number, device), arguments, device)
    if arguments.json:
        facts = {"device": device.name, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


PROGRAM = RankProgram(StagesJob, work)

if __name__ == "__main__":
    main()
