"""Prediction of a run before anything is built, and comparison with the finished run."""

import math
from typing import ClassVar

from pydantic import computed_field

from zeroflow.config import Config
from zeroflow.data.part_counts import row_bytes
from zeroflow.data.shards import expected_bytes
from zeroflow.data.tokenizer import (
    expected_vocab_size,
    without_hub,
)
from zeroflow.device import Device, find_device, free_bytes, known_gpu
from zeroflow.estimate import history
from zeroflow.estimate.history import Figures
from zeroflow.estimate.memory import (
    Room,
    checkpoint_bytes,
    is_measured,
    largest_micro_batch,
    memory,
)
from zeroflow.estimate.speed import expected_tokens_per_second
from zeroflow.model.llama import ActivationCheckpointing
from zeroflow.model.sizes import with_vocabulary
from zeroflow.records import Record
from zeroflow.run_folder import RunFolder
from zeroflow.settings.refusals import refuse_a_plan_for_no_gpu
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import sketch
from zeroflow.settings.settled import Settled
from zeroflow.training.job import TrainingJob
from zeroflow.training.workload import Workload
from zeroflow.training.zero import STAGES, Stage


class StagePlan(Config):
    """Memory of one rank at a ZeRO stage."""

    stage: Stage
    memory: dict[str, int]
    """Bytes by part, with the plan's micro-batch."""

    total: int
    fits: Room
    micro_batch_rows: int
    """Rows of a micro-batch that would be chosen at this stage by default."""

    activation_checkpointing: ActivationCheckpointing


class Plan(Record):
    """Predicted figures of a run."""

    FORMAT: ClassVar[int] = 2

    run: str | None
    size: str
    device: Device
    workload: Workload

    vocabulary_is_certain: bool
    parameters: dict[str, int]
    flops_per_token: int
    tokens: int
    steps: int
    batch_tokens: int
    stages: tuple[StagePlan, ...]
    predicted: Figures
    """Predicted figures; memory is per GPU."""

    rate_source: str
    memory_source: str
    disk_bytes: int
    """Bytes of the shards and of the maximum number of checkpoints that exist at the same time."""

    there_bytes: int
    """Bytes of these that exist already, for a resumed run."""

    free_bytes: int

    @property
    def stage(self) -> StagePlan:
        """Memory at the stage that the run uses."""
        return self.stages[self.workload.zero_stage]


def offline(asked: RunConfig, *, gpu: str | None) -> Plan:
    """Plan `asked` without making requests, or building or recording anything.

    The plan may be for more GPUs than this machine has.

    Args:
        gpu: name of a GPU; None for the device of this machine.

    Raises:
        ValueError: settings contradict each other, the device or the number of GPUs, or there are
            no such files.
    """
    if gpu and asked.device == "cpu":
        raise ValueError("--gpu and --device cpu: drop one of them")
    device = known_gpu(gpu) if gpu else find_device(asked.device)
    refuse_a_plan_for_no_gpu(asked, device)
    if asked.data.data_mode == "files":
        asked.data.source.files("")  # raises if there are none
    return predict(sketch(asked, device), device)


def load(folder: RunFolder) -> Plan | None:
    """Load the plan of a run; None if there is no plan that this version can read."""
    try:
        return Plan.read(folder.plan)
    except (OSError, ValueError):
        return None


def is_same(one: Plan, other: Plan) -> bool:
    return one.workload.costs_as_much_as(other.workload) and one.tokens == other.tokens


def predict(run: Settled, device: Device) -> Plan:
    vocabulary, certain = _vocabulary(run)
    model = with_vocabulary(run.model.shape, vocabulary)
    work = run.workload(model, device)
    stages = tuple(_stage(work, device, stage) for stage in STAGES)
    known = history.known(run.cache_dir, work, planned=(run.run_name, run.schedule.steps))
    rate, source = (known.tokens_per_second, known.source) if known else _rate(run, work, device)
    held = stages[work.zero_stage].total if is_measured(work) else None
    memory_source = "sum of its parts"
    if held is None:
        memory_source = "unknown for such code on a CPU until a run here has been measured"
    if known and known.memory_bytes:
        held, memory_source = known.memory_bytes, known.source
    predicted = Figures(
        tokens_per_second=rate,
        seconds=run.train_tokens / rate if rate else None,
        memory_bytes=held,
        shard_bytes=expected_bytes(run.shard_config, run.data),
        checkpoint_bytes=checkpoint_bytes(work),
    )
    # in addition, the best one and the one being written
    checkpoints = (_kept(run) + 2) * checkpoint_bytes(work)
    return Plan(
        run=run.run_name or None,
        size=run.model.name,
        device=device,
        workload=work,
        vocabulary_is_certain=certain,
        parameters=model.parameters_by_part,
        flops_per_token=work.flops_per_token,
        tokens=run.train_tokens,
        steps=run.schedule.steps,
        batch_tokens=work.batch_tokens,
        stages=stages,
        predicted=predicted,
        rate_source=source,
        memory_source=memory_source,
        disk_bytes=(predicted.shard_bytes or 0) + checkpoints,
        there_bytes=_there(run),
        free_bytes=free_bytes(run.cache_dir),
    )


def _rate(run: Settled, work: Workload, device: Device) -> tuple[float | None, str]:
    """Tokens per second without earlier runs, and the source of the figure."""
    alone = work.replace(ranks=1, zero_stage=0)
    rate: float | None
    if work.ranks > 1 and (known := history.known(run.cache_dir, alone)):
        rate, source = known.tokens_per_second, known.source
    else:
        rate, source = expected_tokens_per_second(alone, device)
    if rate is None or work.ranks == 1 or device.kind == "cpu":  # ranks on a CPU share its cores
        return rate, source
    return rate * work.ranks, f"{source}, times {work.ranks}, not counting communication"


def _kept(run: Settled) -> int:
    """Number of checkpoints that are kept, not counting the best one."""
    retention, saves = run.retention, run.cadence.checkpoint
    if not retention.keep_every:
        return retention.keep
    return retention.keep + run.schedule.steps // math.lcm(saves, retention.keep_every)


def _there(run: RunConfig) -> int:
    """Bytes of the shards and checkpoints that a run of this name already has."""
    if run.run_name is None or not run.folder.job.exists():
        return 0
    try:
        job = TrainingJob.read(run.folder.job)
        saved = sum(
            file.stat().st_size for file in job.folder.checkpoints.rglob("*") if file.is_file()
        )
        return saved + row_bytes(job.shards)
    except (OSError, ValueError):  # a checkpoint was just removed, or is of another version
        return 0


def _vocabulary(run: Settled) -> tuple[int, bool]:
    """Vocabulary size without network access, and True if certain; for text by default Llama's."""
    config = run.tokenizer
    if config.tokenizer_name == "auto":
        config = config.replace(tokenizer_name=without_hub(run.data))
    return expected_vocab_size(config, run.cache_dir)


def _stage(work: Workload, device: Device, stage: Stage) -> StagePlan:
    work = work.replace(zero_stage=stage)
    held = memory(work, device)
    most, kind = largest_micro_batch(work, device)
    return StagePlan(
        stage=stage,
        memory={name: size for name, size in held._asdict().items() if size},
        total=held.total,
        fits=held.room(device, work.ranks),
        micro_batch_rows=work.split(most).micro_batch_rows,
        activation_checkpointing=kind,
    )


class Compared(Record):
    """A figure of the plan, predicted and measured."""

    name: str
    predicted: float | None
    measured: float | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def miss(self) -> float | None:
        """Fraction by which the measured value exceeds the predicted one; None if unknown."""
        if not self.predicted or self.measured is None:
            return None
        return self.measured / self.predicted - 1


def compared(predicted: Figures, measured: Figures) -> list[Compared]:
    """Return each figure of a plan, predicted and measured."""
    return [
        Compared(name=name, predicted=getattr(predicted, name), measured=getattr(measured, name))
        for name in Figures.model_fields
    ]
