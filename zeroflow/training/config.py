"""Training settings that the ranks read."""

from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from zeroflow.config import Config
from zeroflow.reuse import Identity
from zeroflow.training.kernels import Kernels
from zeroflow.training.schedule import Schedule
from zeroflow.training.workload import Workload


class TrainingConfig(Config):
    """Everything that defines the mathematics of training, with the workload of a step."""

    seed: NonNegativeInt
    """Seed of the weights and of the order of the rows."""

    workload: Workload

    z_loss: NonNegativeFloat = 0.0
    """Weight of (log Z)² in the loss."""

    schedule: Schedule

    kernels: Kernels = Field(Kernels(), exclude=True)
    """Kernels that the ranks choose as they start; not in files."""

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def on_one_machine(self) -> Self:
        """The same settings for the ranks of one machine, with the same rows per rank."""
        return self.replace(workload=self.workload.on_one_machine)

    @property
    def identity(self) -> Identity:
        """Settings that affect the result of a check, besides model and schedule."""
        return {
            "seed": self.seed,
            **self.workload.in_format_1,
            "z_loss": self.z_loss,
            "optimizer": self.workload.optimizer.model_dump(mode="json"),
        }
