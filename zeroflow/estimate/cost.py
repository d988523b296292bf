"""Predicted cost of a training: memory at every ZeRO stage, speed, and checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zeroflow.config import Config
from zeroflow.device import Device, Load, find_load
from zeroflow.estimate import history
from zeroflow.estimate.disk import DiskSpeed, disk_speed
from zeroflow.estimate.history import Experience, Figures
from zeroflow.estimate.memory import (
    Room,
    checkpoint_bytes,
    host_state,
    is_measured,
    largest_micro_batch,
    memory,
)
from zeroflow.estimate.run_records import RunRecords
from zeroflow.estimate.run_speed import own_speed, speed
from zeroflow.estimate.speed import Speed
from zeroflow.model.llama import ActivationCheckpointing
from zeroflow.records import omitted
from zeroflow.training.workload import Workload
from zeroflow.training.zero import STAGES, Stage

_DISK_ELSEWHERE = DiskSpeed(
    None, "the disk's speed is unknown, because the plan is for another machine"
)


class StagePlan(Config):
    """Memory of one rank at a ZeRO stage."""

    stage: Stage
    memory: dict[str, int]
    """Bytes by part, with the plan's micro-batch."""

    host: dict[str, int] | None = omitted()
    """Bytes by part of the state in host memory; None if it is on the GPU."""

    total: int
    fits: Room
    micro_batch_rows: int
    """Rows of a micro-batch that would be chosen at this stage by default."""

    activation_checkpointing: ActivationCheckpointing


class MemoryUse(NamedTuple):
    """Predicted memory of a rank."""

    bytes: int | None
    """None if it cannot be predicted."""

    source: str


class Cost(NamedTuple):
    """Predicted cost of a run on a device."""

    load: Load | None
    """Other programs on the cores; None on a GPU."""

    stages: tuple[StagePlan, ...]
    memory: MemoryUse
    speed: Speed
    checkpoint_bytes: int
    disk: DiskSpeed

    def figures(self, tokens: float, shard_bytes: int) -> Figures:
        """Return the figures of a run that trains on `tokens`."""
        rate, disk_rate = self.speed.rate, self.disk.bytes_per_second
        return Figures(
            tokens_per_second=rate.expected if rate else None,
            seconds=tokens / rate.expected if rate else None,
            memory_bytes=self.memory.bytes,
            shard_bytes=shard_bytes,
            checkpoint_bytes=self.checkpoint_bytes,
            checkpoint_seconds=self.checkpoint_bytes / disk_rate if disk_rate else None,
        )


def cost(
    work: Workload,
    device: Device,
    records: RunRecords,
    *,
    planned: tuple[str | None, int],
    folder: Path | None,
) -> Cost:
    """Predict the cost of a run.

    Args:
        planned: name and steps of the run, see `history.known`.
        folder: where checkpoints are written, whose speed may be measured; None for a run on
            another machine.
    """
    load = find_load() if device.kind == "cpu" else None
    known = history.known(records.runs, work, planned=planned)
    own = own_speed(records.trained, work, load)
    stages = tuple(_stage(work, device, stage) for stage in STAGES)
    size = checkpoint_bytes(work)
    return Cost(
        load=load,
        stages=stages,
        memory=_memory(work, stages, known),
        speed=own or speed(work, device, load, known, records.runs),
        checkpoint_bytes=size,
        disk=disk_speed(folder, size, records.runs) if folder else _DISK_ELSEWHERE,
    )


def _stage(work: Workload, device: Device, stage: Stage) -> StagePlan:
    if stage == 0:
        work = work.replace(offload="none")  # there is no offloaded stage 0
    work = work.replace(zero_stage=stage)
    held, host = memory(work, device), host_state(work)
    most, kind = largest_micro_batch(work, device)
    return StagePlan(
        stage=stage,
        memory={name: size for name, size in held._asdict().items() if size},
        host=host and host._asdict(),
        total=held.total,
        fits=held.room(device, work.ranks),
        micro_batch_rows=work.split(most).micro_batch_rows,
        activation_checkpointing=kind,
    )


def _memory(work: Workload, stages: Sequence[StagePlan], known: Experience | None) -> MemoryUse:
    if known and known.memory_bytes:
        return MemoryUse(known.memory_bytes, f"measured, {known.source}")
    if is_measured(work):
        return MemoryUse(stages[work.zero_stage].total, "computed, sum of its parts")
    return MemoryUse(None, "unknown for such code on a CPU until a run here has been measured")
