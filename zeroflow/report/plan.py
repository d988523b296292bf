"""The plan of a run as it is stored, and its comparison with the finished run."""

from typing import ClassVar

from pydantic import computed_field

from zeroflow.config import Config
from zeroflow.device import Device, Load
from zeroflow.estimate.cost import StagePlan
from zeroflow.estimate.history import Figures
from zeroflow.estimate.speed import Rate
from zeroflow.records import Record, omitted
from zeroflow.run_folder import RunFolder
from zeroflow.training.workload import Workload


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


class Compared(Record):
    """A figure of the plan, predicted and measured."""

    name: str
    predicted: float | None
    measured: float | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def difference(self) -> float | None:
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
