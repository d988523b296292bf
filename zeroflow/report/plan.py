"""Prediction of a run before anything is built, and comparison with the finished run."""

import math
from pathlib import Path
from typing import ClassVar

from pydantic import computed_field

from zeroflow.config import Config
from zeroflow.data.part_counts import row_bytes
from zeroflow.data.shards import expected_bytes
from zeroflow.data.tokenizer import Vocabulary, expected_vocabulary
from zeroflow.device import (
    ASSUMED_CAPABILITY,
    Device,
    Load,
    find_load,
    free_bytes,
    gpus_named,
    known_gpu,
)
from zeroflow.estimate import history
from zeroflow.estimate.history import SAME_MARGINS, Experience, Figures
from zeroflow.estimate.memory import (
    Room,
    checkpoint_bytes,
    is_measured,
    largest_micro_batch,
    memory,
)
from zeroflow.estimate.speed import Rate, Speed, expected_speed
from zeroflow.model.llama import ActivationCheckpointing
from zeroflow.model.sizes import with_vocabulary
from zeroflow.records import Record, omitted
from zeroflow.run_folder import RunFolder
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import foresee
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.training import checkpoint, goodput
from zeroflow.training.job import TrainingJob, read_job, trained_tokenizer
from zeroflow.training.workload import Workload
from zeroflow.training.zero import STAGES, Stage
from zeroflow.units import count


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


class Choice(Config):
    """A corpus or a tokenizer that was chosen, and why."""

    name: str
    reason: str


class Plan(Record):
    """Predicted figures of a run."""

    FORMAT: ClassVar[int] = 2

    run: str | None
    size: str
    device: Device
    notes: tuple[str, ...] = ()
    """Assumptions about the device."""

    load: Load | None = omitted()
    """Other programs on the cores when the plan was made; None on a GPU."""

    workload: Workload
    data: Choice | None = omitted()
    tokenizer: Choice | None = omitted()
    """Corpus and tokenizer; None in files of older versions."""

    vocabulary_is_certain: bool
    vocabulary_source: str = ""
    parameters: dict[str, int]
    flops_per_token: int
    tokens: int
    steps: int
    steps_done: int = 0
    """Steps that were trained when the plan was made."""

    batch_tokens: int
    stages: tuple[StagePlan, ...]
    predicted: Figures
    """Predicted figures, for all steps; memory is per GPU."""

    rate: Rate | None = omitted()
    """Range of the predicted tokens per second; None if unknown, and in files of older versions."""

    rate_source: str
    memory_source: str
    disk_bytes: int
    """Approximate bytes of the shards, and of the maximum number of checkpoints that exist at the
    same time."""

    there_bytes: int
    """Bytes of these that exist already, for a resumed run."""

    free_bytes: int

    @property
    def stage(self) -> StagePlan:
        """Memory at the stage that the run uses."""
        return self.stages[self.workload.zero_stage]


def forecast(asked: RunConfig, *, gpu: str | None = None, memory_gb: float | None = None) -> Plan:
    """Plan the run that `asked` would start, without building or recording anything.

    The plan may be for more GPUs than this machine has.

    Args:
        gpu: name of a GPU; None for the device of this machine.
        memory_gb: its memory, if it is not a known GPU.

    Raises:
        ValueError: settings contradict each other, the device or the number of GPUs, or there are
            no such files.
    """
    if memory_gb is not None and not gpu:
        raise ValueError(f"--memory-gb {memory_gb:g} is that of a GPU: name it with --gpu")
    device = known_gpu(gpu, memory_gb) if gpu else None
    return predict(foresee(asked, device), notes=_notes(gpu) if gpu else ())


def _notes(gpu: str) -> tuple[str, ...]:
    """What is assumed about the GPU that is called `gpu`."""
    taken, *others = gpus_named(gpu) or [""]
    if not taken:
        capability = ".".join(map(str, ASSUMED_CAPABILITY))
        return (f"{gpu} is not a known GPU: compute capability {capability} is assumed",)
    if not others:
        return ()
    return (f"--gpu {gpu} is planned as {taken}; also known: {', '.join(others)}",)


def load(folder: RunFolder) -> Plan | None:
    """Load the plan of a run; None if there is no plan that this version can read."""
    try:
        return Plan.read(folder.plan)
    except (OSError, ValueError):
        return None


def is_same(one: Plan, other: Plan) -> bool:
    return one.workload.costs_as_much_as(other.workload) and one.tokens == other.tokens


def predict(settlement: Settlement, *, notes: tuple[str, ...] = ()) -> Plan:
    run, device = settlement.run, settlement.device
    vocabulary = _vocabulary(run)
    model = with_vocabulary(run.model.shape, vocabulary.size)
    work = run.workload(model, device)
    stages = tuple(_stage(work, device, stage) for stage in STAGES)
    known = history.known(run.cache_dir, work, planned=(run.run_name, run.schedule.steps))
    load = find_load() if device.kind == "cpu" else None
    rate, source = _own_speed(run, work) or _speed(run.cache_dir, work, device, load, known)
    held = stages[work.zero_stage].total if is_measured(work) else None
    memory_source = "sum of its parts"
    if held is None:
        memory_source = "unknown for such code on a CPU until a run here has been measured"
    if known and known.memory_bytes:
        held, memory_source = known.memory_bytes, known.source
    predicted = Figures(
        tokens_per_second=rate.expected if rate else None,
        seconds=run.train_tokens / rate.expected if rate else None,
        memory_bytes=held,
        shard_bytes=expected_bytes(run.shard_config, run.data, vocabulary.size),
        checkpoint_bytes=checkpoint_bytes(work),
    )
    return Plan(
        run=run.run_name,
        size=run.model.name,
        device=device,
        notes=notes,
        load=load,
        workload=work,
        data=Choice(name=run.data.name, reason=settlement.corpus_reason),
        tokenizer=Choice(name=run.tokenizer.tokenizer_name, reason=settlement.tokenizer_reason),
        vocabulary_is_certain=vocabulary.is_certain,
        vocabulary_source=vocabulary.source,
        parameters=model.parameters_by_part,
        flops_per_token=work.flops_per_token,
        tokens=run.train_tokens,
        steps=run.schedule.steps,
        steps_done=min(checkpoint.newest_step(run.folder.checkpoints), run.schedule.steps),
        batch_tokens=work.batch_tokens,
        stages=stages,
        predicted=predicted,
        rate=rate,
        rate_source=source,
        memory_source=memory_source,
        disk_bytes=(predicted.shard_bytes or 0) + _most_checkpoints(run) * checkpoint_bytes(work),
        there_bytes=_there(run),
        free_bytes=free_bytes(run.cache_dir),
    )


def _own_speed(run: Settled, work: Workload) -> Speed | None:
    """Speed of the steps that the run has trained already, on the same devices."""
    try:
        if not read_job(run.folder).training.workload.costs_as_much_as(work):
            return None
        account = goodput.read(run.folder)
    except (OSError, ValueError):  # not trained yet, or by another version
        return None
    if not account.steps or not account.training:
        return None
    rate = account.steps * work.batch_tokens / account.training
    steps = count(account.steps, "step")
    return Speed(Rate.around([rate], SAME_MARGINS[work.device]), f"as in {steps} of this run")


_ENOUGH_RUNS = 3
"""Number of earlier runs that show how much other programs slow a CPU down."""


def _speed(
    cache: Path, work: Workload, device: Device, load: Load | None, known: Experience | None
) -> Speed:
    """Speed without the run's own steps: from earlier runs, or from the device's FLOP/s."""
    if known:
        return _with_load(known, work, device, load)
    alone = work.replace(ranks=1, nodes=1, zero_stage=0, shard_group=None)
    if work.ranks > 1 and (one := history.known(cache, alone)):
        speed = _with_load(one, alone, device, load)
    else:
        speed = expected_speed(alone, device, load)
    if speed.rate is None or work.ranks == 1 or load:  # ranks on a CPU share its cores
        return speed
    source = f"{speed.source}, times {work.ranks}, not counting communication"
    return Speed(speed.rate.times(work.ranks), source)


def _with_load(known: Experience, work: Workload, device: Device, load: Load | None) -> Speed:
    """Widen the speed of earlier runs on a CPU: it may be busier or less busy than it was then."""
    rate, source = known.rate, known.source
    if load is None:
        return Speed(rate, source)
    rate = rate.replace(low=load.share * rate.low)
    if known.runs < _ENOUGH_RUNS:
        now = expected_speed(work, device)
        assert now.rate is not None, "every CPU can be measured"
        usual = now.rate.expected
        rate = rate.replace(low=min(rate.low, usual), high=max(rate.high, usual))
        source += f"; {now.source}"
    return Speed(rate, source)


def _most_checkpoints(run: Settled) -> int:
    """Maximum number of checkpoints that exist at the same time."""
    written = -(-run.schedule.steps // run.cadence.checkpoint)
    return min(written, _kept(run) + 2)  # the best one and the one being written


def _kept(run: Settled) -> int:
    """Number of checkpoints that are kept, not counting the best one."""
    retention, saves = run.retention, run.cadence.checkpoint
    if not retention.keep_every:
        return retention.keep
    return retention.keep + run.schedule.steps // math.lcm(saves, retention.keep_every)


def _there(run: Settled) -> int:
    """Bytes of the shards and checkpoints that a run of this name already has."""
    if not run.folder.job.exists():
        return 0
    try:
        job = TrainingJob.read(run.folder.job)
        saved = sum(
            file.stat().st_size for file in job.folder.checkpoints.rglob("*") if file.is_file()
        )
        return saved + row_bytes(job.shards)
    except (OSError, ValueError):  # a checkpoint was just removed, or is of another version
        return 0


def _vocabulary(run: Settled) -> Vocabulary:
    """Vocabulary of the run's tokenizer, which may not be in the cache yet."""
    if trained := trained_tokenizer(run.folder):
        return Vocabulary(trained.vocab_size, True, "of the run's tokenizer")
    return expected_vocabulary(run.tokenizer, run.data, run.cache_dir)


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
