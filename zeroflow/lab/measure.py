"""Measurement of workloads on the ranks of one job: `-m zeroflow.lab.measure JOB.json`.

Each workload is measured in three ways, with fresh weights from the same seed: one eager step with
every tensor and collective recorded; steps that are timed and whose losses are kept; and a few
profiled steps. A single rank is only a reference for losses and speed.
"""

import gc
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from pydantic import PositiveFloat, PositiveInt

from zeroflow.config import Config
from zeroflow.data.batches import Batches
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet
from zeroflow.lab import links, network, timeline
from zeroflow.lab.collectives import CollectiveCounter, Traffic
from zeroflow.lab.links import LinkMeasurements
from zeroflow.lab.network import Network
from zeroflow.lab.tensors import TensorRecorder
from zeroflow.lab.timeline import Span
from zeroflow.records import Record
from zeroflow.training import zero
from zeroflow.training.batching import batches
from zeroflow.training.config import TrainingConfig
from zeroflow.training.events import EVENTS, Done, Stopped
from zeroflow.training.job import RankJob
from zeroflow.training.loop import train_step
from zeroflow.training.pulse import Pulse, PulseWriter
from zeroflow.training.rank_program import RankProgram, make_deterministic
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.stopping import Parent, Stop
from zeroflow.training.workload import Workload
from zeroflow.units import count

log = logging.getLogger("zeroflow.lab")

PHASE = "ZeRO laboratory"
"""Phase of the pulses."""

_WARM_UP = 2
"""Steps before the first timed one."""

_PROFILED = 3
"""Profiled steps, of which the one with the median of exposed communication is kept."""


_FIT_STEPS = 5
"""Timed steps of a workload that fits under a cap of memory."""


class Fit(Config):
    """A workload that fits under a cap of memory, and a slightly larger one."""

    workload: Workload
    above: Workload
    """The workload with one more row in a micro-batch, or one more block in the model."""


class LabJob(RankJob):
    """Job of the ranks that measure several workloads, one after the other."""

    shards: ShardSet
    workloads: tuple[Workload, ...]
    """Workloads with the same number of ranks and the same global batch."""

    links: bool = False
    """If True, only single collectives are measured, and steps at `bandwidths`."""

    bandwidths: tuple[PositiveFloat, ...] = ()
    """Limits of what a rank sends, in 10⁹ bits per second."""

    network: Network | None = None
    """Network of the ranks; None for that of this machine."""

    fits: tuple[Fit, ...] = ()
    """Workloads under a cap of memory. If there are any, only these are measured."""

    threads: PositiveInt
    """Threads of each rank on a CPU."""

    result: Path
    """File for the `Measurements`."""


class Measurement(Record):
    """Figures of a workload."""

    workload: Workload
    losses: tuple[float, ...]
    """Loss of every step."""

    seconds: tuple[float, ...]
    """Times of the steps after the first two."""

    memory: dict[str, int]
    """Largest bytes of each part on any rank; empty for a single rank."""

    host: dict[str, int]
    """Largest bytes of each part of the state in host memory; empty if there is none."""

    traffic: dict[str, Traffic]
    """Collectives of a step of rank 0."""

    spans: tuple[Span, ...]
    """Timeline of a step of rank 0; empty for a single rank."""

    @property
    def step_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(self.seconds)


class FitMeasurement(Record):
    """Figures of a `Fit`."""

    peak: int
    """Largest bytes of the tensors of any rank."""

    peak_above: int
    """Peak of the larger workload."""

    step_seconds: float
    """Median."""


Found = TypeVar("Found", Measurement, FitMeasurement)


class Measurements(Record):
    """Figures of all workloads of a job."""

    found: tuple[Measurement, ...] = ()
    links: LinkMeasurements | None = None
    fits: tuple[FitMeasurement, ...] = ()


def measure(config: TrainingConfig, rows: Rows) -> Measurement:
    """Measure the workload of `config` on this rank, together with the other ranks."""
    source, work = batches(rows, config), config.workload
    step = RecordedStep({}, {}, {})
    if work.ranks > 1:
        step = record_step(config.replace(workload=work.replace(compile=False)), source)
        _clear(work)
    losses, seconds, spans = train(config, source)
    _clear(work)
    log.info(
        "%s: loss %.6f after %d steps, %.4g s per step",
        *(work.devices, losses[-1], len(losses), statistics.median(seconds)),
    )
    return Measurement(
        workload=work,
        losses=tuple(losses),
        seconds=tuple(seconds),
        memory={part: zero.max_over_ranks(size) for part, size in step.memory.items()},
        host={part: zero.max_over_ranks(size) for part, size in step.host.items()},
        traffic=step.traffic,
        spans=tuple(spans),
    )


class RecordedStep(NamedTuple):
    """Tensors and collectives of a step."""

    memory: dict[str, int]
    """Largest bytes of each part."""

    host: dict[str, int]
    """Largest bytes of each part of the state in host memory; empty if there is none."""

    traffic: dict[str, Traffic]


def record_step(config: TrainingConfig, source: Batches) -> RecordedStep:
    """Return the memory of the second step, and its collectives."""
    state = new_state(config)
    train_step(state, source.micro_batches(0), config)
    tensors, collectives = TensorRecorder(state), CollectiveCounter()
    micro_batches = source.micro_batches(1)
    with collectives, tensors:
        train_step(state, micro_batches, config)
    return RecordedStep(tensors.peaks(), tensors.host_peaks(), collectives.traffic)


def train(config: TrainingConfig, source: Batches) -> tuple[list[float], list[float], list[Span]]:
    """Train all steps; return their losses, the times of steps, and the timeline of one."""
    work = config.workload
    state = new_state(config)
    losses, seconds = _timed(state, config, source, config.steps)

    def spans(step: int) -> list[Span]:
        batch = source.micro_batches(step)
        return timeline.recorded(lambda: train_step(state, batch, config).loss.item(), work.device)

    if work.ranks == 1:
        return losses, seconds, []
    profiled = sorted(map(spans, range(_PROFILED)), key=timeline.exposed)
    return losses, seconds, profiled[_PROFILED // 2]


def _timed(
    state: TrainState, config: TrainingConfig, source: Batches, steps: int
) -> tuple[list[float], list[float]]:
    """Train `steps` steps; return their losses, and the times of those after the warm-up."""
    losses, seconds = [], []
    for step in range(steps):
        micro_batches = source.micro_batches(step)
        began = time.perf_counter()
        loss = train_step(state, micro_batches, config).loss.item()  # waits for the device
        losses.append(loss)
        seconds.append(time.perf_counter() - began)
    return losses, seconds[_WARM_UP:] or seconds


def measure_fit(fit: Fit, config: TrainingConfig, rows: Rows) -> FitMeasurement:
    """Measure the speed of the workload that fits, and the memory of both."""
    peak, seconds = peak_and_speed(config.replace(workload=fit.workload), rows, _FIT_STEPS)
    above, _ = peak_and_speed(config.replace(workload=fit.above), rows, 0)
    work = fit.workload
    log.info(
        "%s, %s, %s: %.4g s per step",
        work.devices,
        count(work.model.num_hidden_layers, "block"),
        count(work.micro_batch_rows, "row"),
        seconds,
    )
    return FitMeasurement(
        peak=zero.max_over_ranks(peak),
        peak_above=zero.max_over_ranks(above),
        step_seconds=seconds,
    )


def peak_and_speed(config: TrainingConfig, rows: Rows, steps: int) -> tuple[int, float]:
    """Return the largest bytes of this rank's tensors in a step, and the median time of `steps`.

    The allocator of a GPU counts the bytes, in the steps that are timed. On a CPU, the tensors of
    an eager step are recorded, and no step is timed if `steps` is 0.
    """
    source, work = batches(rows, config), config.workload
    if work.device == "cuda":
        state = new_state(config)
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_timed(state, config, source, _WARM_UP + steps)[1])
        peak = torch.cuda.max_memory_allocated()
    else:
        step = record_step(config.replace(workload=work.replace(compile=False)), source)
        state, peak = new_state(config), step.memory["peak"]
        seconds = 0.0
        if steps:
            seconds = statistics.median(_timed(state, config, source, _WARM_UP + steps)[1])
    del state
    _clear(work)
    return peak, seconds


def _clear(work: Workload) -> None:
    gc.collect()
    if work.compile:
        torch.compiler.reset()  # otherwise differently sharded blocks are compiled as dynamic ones
    if work.device == "cuda":
        torch.cuda.empty_cache()


def work(job: LabJob, stop: Stop) -> None:
    if job.training.workload.deterministic:
        make_deterministic()
    torch.set_num_threads(job.threads)
    rows = Rows(job.shards, "train")
    if job.links:
        if (found_links := _over_links(job, rows, stop)) is not None:
            _finish(job, Measurements(links=found_links))
        return
    if job.fits:
        tasks = [(fit.workload, partial(measure_fit, fit, job.training, rows)) for fit in job.fits]
        if (found_fits := _in_turn(job, tasks, stop)) is not None:
            _finish(job, Measurements(fits=tuple(found_fits)))
        return
    steps = [
        (workload, partial(measure, job.training.replace(workload=workload), rows))
        for workload in job.workloads
    ]
    if (found := _in_turn(job, steps, stop)) is not None:
        _finish(job, Measurements(found=tuple(found)))


def _over_links(job: LabJob, rows: Rows, stop: Stop) -> LinkMeasurements | None:
    """Return the measurement of the links, or None if this job was stopped."""
    pulses = PulseWriter(job.folder.alive)

    def goes_on(done: int, rounds: int) -> bool:
        if zero.rank() == 0:
            pulses(Pulse(PHASE, done, rounds, "steps over links"))
        return not stop()

    configs = [job.training.replace(workload=workload) for workload in job.workloads]
    found = links.measure(configs, lambda config: batches(rows, config), job.bandwidths, goes_on)
    if found is None:
        _say_stopped(job)
    return found


def _in_turn(
    job: LabJob, tasks: Sequence[tuple[Workload, Callable[[], Found]]], stop: Stop
) -> list[Found] | None:
    """Return the results of all `tasks`, or None if this job was stopped."""
    pulses = PulseWriter(job.folder.alive)
    found: list[Found] = []
    for workload, task in tasks:
        if zero.rank() == 0:
            pulses(Pulse(PHASE, len(found), len(tasks), workload.devices))
        found.append(task())
        if stop():
            break
    if len(found) == len(tasks):
        return found
    _say_stopped(job)
    return None


def _say_stopped(job: LabJob) -> None:
    if zero.rank() == 0:
        message = "the laboratory was stopped; the same command repeats it"
        EVENTS.append(job.folder.events, Stopped(time=time.time(), message=message))


def _finish(job: LabJob, found: Measurements) -> None:
    if zero.rank() == 0:
        found.write(job.result)
        EVENTS.append(job.folder.events, Done(time=time.time()))


class _LabProgram(RankProgram[LabJob]):
    def run(self, job_file: Path, parent: Parent | None = None) -> None:
        """Run the program, in the network of its job: before anything opens a connection."""
        job = self.job_type.read(job_file)
        if job.network:
            network.enter(job.network, int(os.environ["RANK"]))
        super().run(job_file, parent)


PROGRAM = _LabProgram(LabJob, work)
