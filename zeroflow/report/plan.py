"""Prediction of a run before anything is built, and comparison with the finished run."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from pydantic import computed_field

from zeroflow.config import Config
from zeroflow.data.part_counts import row_bytes
from zeroflow.data.shards import expected_bytes
from zeroflow.data.sufficient import require_both_splits
from zeroflow.data.tokenizer import (
    Vocabulary,
    density,
    expected_vocabulary,
)
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
from zeroflow.estimate.disk import DiskSpeed, disk_speed
from zeroflow.estimate.history import Experience, Figures, Past
from zeroflow.estimate.memory import (
    Room,
    checkpoint_bytes,
    host_state,
    is_measured,
    largest_micro_batch,
    memory,
)
from zeroflow.estimate.run_speed import PastTraining, already_trained, own_speed, speed
from zeroflow.estimate.speed import Rate, Speed
from zeroflow.model.llama import ActivationCheckpointing, ModelConfig
from zeroflow.records import Record, omitted
from zeroflow.run_folder import RunFolder
from zeroflow.settings.remarks import remarks
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import foresee
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.tracking.config import is_server, location
from zeroflow.training import checkpoint
from zeroflow.training.job import TrainingJob, trained_tokenizer
from zeroflow.training.workload import Workload
from zeroflow.training.zero import STAGES, Stage


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


class Choice(Config):
    """A corpus or a tokenizer that was chosen, and why."""

    name: str
    reason: str


class Plan(Record):
    """Predicted figures of a run."""

    FORMAT: ClassVar[int] = 2

    run: str | None
    size: str
    init_from: str | None = omitted()
    """Trained model that the run starts from; None for random weights."""

    device: Device
    notes: tuple[str, ...] = ()
    """Assumptions about the device, settings without effect, and intervals longer than the run."""

    load: Load | None = omitted()
    """Other programs on the cores when the plan was made; None on a GPU."""

    workload: Workload
    data: Choice | None = omitted()
    tokenizer: Choice | None = omitted()
    """Corpus and tokenizer; None in files of older versions."""

    vocabulary_is_certain: bool
    vocabulary_is_limit: bool = False
    """True if the vocabulary, and therefore the model, may be smaller."""

    vocabulary_source: str = ""
    vocabulary_tokens: int | None = omitted()
    """Tokens of the tokenizer. The model's vocabulary is padded to a multiple of 128. None in files
    of older versions."""

    parameters: dict[str, int]
    flops_per_token: int
    tokens: int
    steps: int
    steps_done: int = 0
    """Steps that were trained when the plan was made."""

    batch_tokens: int
    stages: tuple[StagePlan, ...]
    predicted: Figures
    """Predicted figures; the seconds are those of the steps that remained. Memory is per GPU."""

    rate: Rate | None = omitted()
    """Range of the predicted tokens per second; None if unknown, and in files of older versions."""

    rate_source: str
    memory_source: str
    shard_source: str = ""
    """Basis of the predicted size of the shards; empty in files of older versions, and for
    synthetic data."""

    disk_bytes: int
    """Approximate bytes of the shards, of the maximum number of checkpoints that exist at the same
    time, and of registered models."""

    registered_bytes: int = 0
    """Bytes of models in MLflow, a part of `disk_bytes`: the last and the best one, if the run
    registers them and MLflow is on this machine."""

    there_bytes: int
    """Part of `disk_bytes` that already exists, for a resumed run."""

    free_bytes: int
    checkpoint_every: int | None = omitted()
    """Steps between checkpoints; None in files of older versions."""

    disk_source: str = ""
    """Source of the time to write a checkpoint, or the reason why it is unknown."""

    @property
    def checkpoint_interval_seconds(self) -> float | None:
        """Predicted training time between two checkpoints; None if unknown."""
        if self.rate is None or self.checkpoint_every is None:
            return None
        return self.checkpoint_every * self.batch_tokens / self.rate.expected

    @property
    def stage(self) -> StagePlan:
        """Memory at the stage that the run uses."""
        return self.stages[self.workload.zero_stage]


def forecast(asked: RunConfig, *, gpu: str | None = None, memory_gb: float | None = None) -> Plan:
    """Plan the run that `asked` would start, without building or recording anything.

    The plan may be for more GPUs than this machine has.

    Args:
        gpu: name of a GPU; None for the device of this machine.
        memory_gb: memory of a GPU that is not known.

    Raises:
        ValueError: settings contradict each other, the device or the number of GPUs, there are no
            such files, or a small text does not suffice for training and validation.
    """
    if memory_gb is not None and not gpu:
        raise ValueError(f"--memory-gb {memory_gb:g} is that of a GPU: name it with --gpu")
    device = known_gpu(gpu, memory_gb) if gpu else None
    return predict(foresee(asked, device), notes=_notes(gpu) if gpu else (), here=not gpu)


def _notes(gpu: str) -> tuple[str, ...]:
    """Return the assumptions about the GPU with the name `gpu`."""
    taken, *others = gpus_named(gpu) or [""]
    if not taken:
        capability = ".".join(map(str, ASSUMED_CAPABILITY))
        return (f"{gpu} is not a known GPU: compute capability {capability} is assumed",)
    if not others:
        return ()
    return (f"--gpu {gpu} means {taken}; other known GPUs: {', '.join(others)}",)


def load(folder: RunFolder) -> Plan | None:
    """Load the plan of a run; None if there is no plan that this version can read."""
    try:
        return Plan.read(folder.plan)
    except (OSError, ValueError):
        return None


def save(plan: Plan, folder: RunFolder) -> None:
    """Save the plan of a run in its directory.

    It is replaced only if the run has changed, so that measurements are compared with the
    prediction made before the run.
    """
    before = load(folder)
    kept = before if before and _is_same(before, plan) else plan
    kept.replace(free_bytes=plan.free_bytes).write(folder.plan)


def _is_same(one: Plan, other: Plan) -> bool:
    return one.workload.costs_as_much_as(other.workload) and one.tokens == other.tokens


class _Facts(NamedTuple):
    """Facts about the cache, the run and the machine from which a prediction is computed."""

    runs: list[Past]
    """Earlier runs in the cache."""

    trained: PastTraining | None
    steps_done: int
    vocabulary: Vocabulary
    shard_bytes: int
    """Bytes of the shards that the run needs."""

    shard_source: str
    there_bytes: int
    load: Load | None
    free_bytes: int


_DISK_ELSEWHERE = DiskSpeed(
    None, "the disk's speed is unknown, because the plan is for another machine"
)


def predict(settlement: Settlement, *, notes: tuple[str, ...] = (), here: bool = True) -> Plan:
    """Plan a run.

    Args:
        notes: assumptions about the device.
        here: the run is for this machine, so its disk may be measured.
    """
    run, device = settlement.run, settlement.device
    facts = _look_up(run, device)
    vocabulary, steps = facts.vocabulary, run.schedule.steps
    done = min(facts.steps_done, steps)
    model = run.network(vocabulary.size)
    work = run.workload(model, device)
    stages = tuple(_stage(work, device, stage) for stage in STAGES)
    known = history.known(facts.runs, work, planned=(run.run_name, steps))
    rate, source = _rate(facts, work, device, known)
    held, memory_source = _memory(work, stages, known)
    one = checkpoint_bytes(work)
    disk = disk_speed(run.cache_dir, one, facts.runs) if here else _DISK_ELSEWHERE
    registered = _registered_bytes(run, model)
    return Plan(
        run=run.run_name,
        size=run.model.name,
        init_from=run.model.init_from,
        device=device,
        notes=(*notes, *remarks(run)),
        load=facts.load,
        workload=work,
        data=Choice(name=run.data.name, reason=settlement.corpus_reason),
        tokenizer=Choice(name=run.tokenizer.tokenizer_name, reason=settlement.tokenizer_reason),
        vocabulary_is_certain=vocabulary.is_certain,
        vocabulary_is_limit=vocabulary.is_limit,
        vocabulary_source=vocabulary.source,
        vocabulary_tokens=vocabulary.size,
        parameters=model.parameters_by_part,
        flops_per_token=work.flops_per_token,
        tokens=run.train_tokens,
        steps=steps,
        steps_done=done,
        batch_tokens=work.batch_tokens,
        stages=stages,
        predicted=Figures(
            tokens_per_second=rate.expected if rate else None,
            seconds=_remaining(run.train_tokens, steps, done) / rate.expected if rate else None,
            memory_bytes=held,
            shard_bytes=facts.shard_bytes,
            checkpoint_bytes=one,
            checkpoint_seconds=one / disk.bytes_per_second if disk.bytes_per_second else None,
        ),
        rate=rate,
        rate_source=source,
        memory_source=memory_source,
        shard_source=facts.shard_source,
        disk_bytes=facts.shard_bytes + _checkpoints(run) * one + registered,
        registered_bytes=registered,
        there_bytes=facts.there_bytes,
        free_bytes=facts.free_bytes,
        checkpoint_every=run.cadence.checkpoint,
        disk_source=disk.source,
    )


def _rate(facts: _Facts, work: Workload, device: Device, known: Experience | None) -> Speed:
    """Return the speed of the run's own steps, or else a predicted one."""
    own = own_speed(facts.trained, work, facts.load)
    return own or speed(work, device, facts.load, known, facts.runs)


def _checkpoints(run: Settled) -> int:
    """Return the maximum number of checkpoints that exist at once."""
    return run.retention.most_at_once(run.schedule.steps, every=run.cadence.checkpoint)


def _registered_bytes(run: Settled, model: ModelConfig) -> int:
    """Return the bytes of the last and the best model, each in fp32, if this machine stores them.

    An MLflow server stores them elsewhere.
    """
    stored = run.register_ and not is_server(location(run.cache_dir)[0])
    return 2 * 4 * model.parameters if stored else 0


def _remaining(tokens: int, steps: int, done: int) -> float:
    """Return the tokens of the steps that remain; those of all steps if none remains."""
    return tokens * ((steps - done) or steps) / steps


def _memory(
    work: Workload, stages: Sequence[StagePlan], known: Experience | None
) -> tuple[int | None, str]:
    """Return the predicted memory in bytes, if it can be predicted, and its source."""
    if known and known.memory_bytes:
        return known.memory_bytes, f"measured, {known.source}"
    if is_measured(work):
        return stages[work.zero_stage].total, "computed, sum of its parts"
    return None, "unknown for such code on a CPU until a run here has been measured"


def _look_up(run: Settled, device: Device) -> _Facts:
    there = _there(run.folder)
    runs, trained = history.read(run.cache_dir), already_trained(run.folder)
    steps_done = checkpoint.newest_step(run.folder.checkpoints)
    if tokenizer := trained_tokenizer(run.folder):
        load = tokenizer.load if tokenizer.path else None
        vocabulary = Vocabulary(tokenizer.vocab_size, True, "of the run's tokenizer", load=load)
    else:
        vocabulary = expected_vocabulary(run.tokenizer, run.data, run.cache_dir)
        require_both_splits(run.data, run.shard_config.layout, vocabulary.load)
    text = density(run.tokenizer, run.data, vocabulary)
    return _Facts(
        runs=runs,
        trained=trained,
        steps_done=steps_done,
        vocabulary=vocabulary,
        shard_bytes=expected_bytes(run.shard_config, run.data, text.bytes_per_token),
        shard_source=text.source if run.data.is_text else "",
        there_bytes=there,
        load=find_load() if device.kind == "cpu" else None,
        free_bytes=free_bytes(run.cache_dir),
    )


def _there(folder: RunFolder) -> int:
    """Bytes of the shards and checkpoints that a run of this name already has."""
    if not folder.job.exists():
        return 0
    try:
        saved = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
        return saved + row_bytes(TrainingJob.read(folder.job).shards)
    except (OSError, ValueError):  # a checkpoint was just removed, or is of another version
        return 0


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
