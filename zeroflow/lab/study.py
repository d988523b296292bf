"""The study: launch the ranks that measure, and compare their figures with the formulas."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Self

from pydantic import PositiveFloat, ValidationInfo, field_validator, model_validator

from zeroflow.config import Config, flag
from zeroflow.device import cores, find_device
from zeroflow.lab import collectives, fit, memory, timeline
from zeroflow.lab.collectives import Traffic
from zeroflow.lab.measure import LabJob, Measurement, Measurements
from zeroflow.lab.network import network
from zeroflow.lab.prediction import StageSteps, slow_links
from zeroflow.lab.record import Amount, Collective, MemoryFit, SlowLinks, ZeroLab, ZeroStage
from zeroflow.training.events import Event
from zeroflow.training.job import TrainingJob
from zeroflow.training.launch import launch
from zeroflow.training.pulse import Pulse
from zeroflow.training.workload import Workload
from zeroflow.training.zero import STAGES, Offload, Stage
from zeroflow.units import decimal

log = logging.getLogger(__name__)

OnEvent = Callable[[Event | Pulse], None]


class LabConfig(Config):
    """Settings of the ZeRO laboratory."""

    zero_stages: tuple[Stage, ...] = ()
    """ZeRO stages to measure. Default: all. With --shard-group, stages 1 to 3 are also measured in
    groups."""

    bandwidth_gbps: tuple[PositiveFloat, ...] = ()
    """Bandwidths of a rank, in 10⁹ bits per second, for which the time of a step is also predicted.
    On a CPU it is measured too: the ranks then run in network namespaces, which needs root."""

    memory_gb: PositiveFloat | None = None
    """Cap on the memory of a rank, in 10⁹ bytes of tensors. The largest micro-batch and the model
    with the most blocks that fit at each stage are then also measured."""

    offload: Offload = "none"
    """State to keep in host memory: stages 1 to 3 are then measured with and without it. See
    zeroflow pretrain."""

    @field_validator("zero_stages", "bandwidth_gbps")
    @classmethod
    def _each_once(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            listed = ", ".join(map(str, values))
            raise ValueError(f"{flag(str(info.field_name))} lists a value twice: {listed}")
        return values

    @model_validator(mode="after")
    def _offload_needs_a_sharded_stage(self) -> Self:
        if self.offload != "none" and not any(self.stages):
            raise ValueError(
                f"--offload {self.offload} needs ZeRO stage 1, 2 or 3, but --zero-stages is 0: add "
                "one of these stages, or drop --offload"
            )
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.zero_stages or STAGES

    @property
    def cap_bytes(self) -> int | None:
        """The cap on the memory of a rank."""
        return None if self.memory_gb is None else round(self.memory_gb * 1e9)


class Study(Config):
    """Results of the laboratory, and the measurements that its plots show."""

    lab: ZeroLab
    one_rank: Measurement
    measurements: tuple[Measurement, ...]
    """One for each of the stages of `lab`."""


def study(job: TrainingJob, config: LabConfig, on_event: OnEvent) -> Study:
    """Measure every stage on the ranks of `job`, and one rank with the same batches.

    Raises:
        TrainingFailed: a rank failed.
        TrainingStopped: the ranks were stopped from outside.
    """
    work = job.training.workload
    alone, split_otherwise = _of_one_rank(work)
    log.info("training on one rank, with two splits of a step into micro-batches")
    reference, other = _measured(job, (alone, split_otherwise), on_event)
    log.info("measuring %s", ", ".join(f"stage {stage}" for stage in config.stages))
    found = _measured(job, _workloads(work, config), on_event)
    lab = ZeroLab(
        device=work.device_name,
        ranks=work.ranks,
        parameters=work.model.parameters,
        tokens_per_step=work.batch_tokens,
        micro_batches=work.accumulate,
        precision=work.precision,
        compiled=work.compile,
        steps=job.training.steps,
        noise_floor=_difference(reference, other),
        one_rank_tokens_per_second=work.batch_tokens / reference.step_seconds,
        stages=tuple(_stage(one, reference) for one in found),
        slow_links=_over_links(job, config, found, on_event) if config.bandwidth_gbps else None,
        fit=config.cap_bytes and _under_cap(job, config, config.cap_bytes, on_event),
    )
    return Study(lab=lab, one_rank=reference, measurements=found)


def _of_one_rank(work: Workload) -> tuple[Workload, Workload]:
    """Return the same step on one rank, and the same with larger micro-batches."""
    micro_batches = work.accumulate * work.ranks
    alone = work.replace(ranks=1, zero_stage=0, shard_group=None, accumulate=micro_batches)
    joined = next(n for n in range(2, micro_batches + 1) if micro_batches % n == 0)
    larger = {
        "micro_batch_rows": joined * work.micro_batch_rows,
        "accumulate": micro_batches // joined,
    }
    return alone, alone.replace(**larger)


def _workloads(work: Workload, config: LabConfig) -> tuple[Workload, ...]:
    found = [work.replace(zero_stage=stage, shard_group=None) for stage in config.stages]
    sharded = [stage for stage in config.stages if stage > 0]
    if work.shard_group is not None:
        found += [work.replace(zero_stage=stage) for stage in sharded]
    if config.offload != "none":
        offloaded = work.replace(shard_group=None, offload=config.offload)
        found += [offloaded.replace(zero_stage=stage) for stage in sharded]
    return tuple(found)


def _over_links(
    job: TrainingJob, config: LabConfig, found: Sequence[Measurement], on_event: OnEvent
) -> SlowLinks:
    """Predict steps over slow links, and measure them if the links can be limited.

    Args:
        found: measurements of all stages, of which those over all ranks come first.
    """
    over_all_ranks = found[: len(config.stages)]
    workloads = tuple(one.workload for one in over_all_ranks)
    bandwidths = tuple(sorted(config.bandwidth_gbps, reverse=True))
    listed = ", ".join(f"{gbps:g}" for gbps in bandwidths)
    seconds: Sequence[Sequence[float]] = [one.seconds for one in over_all_ranks]
    if workloads[0].device == "cpu":
        log.info("measuring steps over links of %s Gbit/s", listed)
        with network(workloads[0].ranks) as joined:
            settings = {"bandwidths": bandwidths, "network": joined}
            links = _launched(job, workloads, on_event, links=True, **settings).links
        assert links is not None
        seconds = links.steps[0].step_seconds
    else:
        log.info("measuring collectives, to predict steps over links of %s Gbit/s", listed)
        links = _launched(job, workloads, on_event, links=True).links
        assert links is not None
    stages = [
        StageSteps(one.workload, steps, one.spans)
        for one, steps in zip(over_all_ranks, seconds, strict=True)
    ]
    return slow_links(links.collectives, stages, bandwidths, links.steps)


def _under_cap(job: TrainingJob, config: LabConfig, cap: int, on_event: OnEvent) -> MemoryFit:
    """Find the largest micro-batches and models under a cap, and measure them."""
    work = job.training.workload
    device = find_device(work.device)
    workloads = _workloads(work, config)
    sizes = [fit.largest(one, device, cap) for one in workloads]
    fits = [one for stage in sizes for one in stage.fits]
    log.info("measuring what fits into %s per rank", decimal(cap))
    found = _launched(job, workloads, on_event, fits=tuple(fits)).fits if fits else ()
    return fit.record(sizes, found, device, cap)


def _measured(
    job: TrainingJob, workloads: tuple[Workload, ...], on_event: OnEvent
) -> tuple[Measurement, ...]:
    return _launched(job, workloads, on_event).found


def _launched(
    job: TrainingJob, workloads: tuple[Workload, ...], on_event: OnEvent, **settings: Any
) -> Measurements:
    ranks, folder = workloads[0].ranks, job.folder
    lab = LabJob(
        run_dir=job.run_dir,
        training=job.training.replace(workload=workloads[0]),
        shards=job.shards,
        workloads=workloads,
        threads=max(1, cores() // job.training.workload.ranks),
        result=folder.lab_measurements(ranks),
        **settings,
    )
    lab.result.unlink(missing_ok=True)
    lab.write(folder.lab_job(ranks))
    launch(
        "zeroflow.lab.measure",
        folder.lab_job(ranks),
        on_event,
        ranks=ranks,
        hang_seconds=job.hang_seconds,
        compile_cache=job.compile_cache,
    )
    return Measurements.read(lab.result)


def _stage(found: Measurement, reference: Measurement) -> ZeroStage:
    work = found.workload
    predicted = memory.predicted(work)
    return ZeroStage(
        stage=work.zero_stage,
        shard_group=work.shard_group,
        offload=work.offload,
        memory={
            part: Amount(predicted=predicted[part], measured=measured)
            for part, measured in found.memory.items()
        },
        host=_on_host(found),
        collectives=_compared(found.traffic, collectives.predicted(work)),
        tokens_per_second=work.batch_tokens / found.step_seconds,
        step_seconds=found.step_seconds,
        communication_seconds=timeline.communication(found.spans),
        exposed_seconds=timeline.exposed(found.spans),
        max_loss_difference=_difference(found, reference),
    )


def _on_host(found: Measurement) -> dict[str, Amount] | None:
    predicted = memory.predicted_on_host(found.workload)
    amounts = {
        part: Amount(predicted=predicted[part], measured=measured)
        for part, measured in found.host.items()
    }
    return amounts or None


def _compared(measured: dict[str, Traffic], predicted: dict[str, Traffic]) -> dict[str, Collective]:
    none = Traffic(count=0, bytes=0)
    found = {}
    for name in sorted(measured.keys() | predicted.keys()):
        is_, should = measured.get(name, none), predicted.get(name, none)
        found[name] = Collective(
            count=is_.count,
            bytes=is_.bytes,
            predicted_count=should.count,
            predicted_bytes=should.bytes,
        )
    return found


def _difference(one: Measurement, other: Measurement) -> float:
    """Return the largest difference of a loss."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
