"""What decides the cost and the mathematics of a training step."""

from typing import Annotated

from pydantic import Field

from zeroflow.config import Config
from zeroflow.device import Precision
from zeroflow.model.llama import ModelConfig, Recompute

STAGES = (0, 1, 2, 3)
"""Of ZeRO: what ranks share out. 0 nothing, 1 moments and weights, 2 gradients too, 3 weights also
while they are used."""


Stage = Annotated[int, Field(ge=min(STAGES), le=max(STAGES))]
"""One of `STAGES`. No Literal: of a choice that is 0, Prefect's form shows an empty one."""


def devices(name: str, gpus: int, stage: Stage) -> str:
    """What a run is on, such as 2 x NVIDIA H200, ZeRO stage 3."""
    if gpus == 1:
        return name
    of = "processes on one" if "CPU" in name else "x"
    return f"{gpus} {of} {name}, ZeRO stage {stage}"


def arithmetic(precision: Precision, *, fp8: bool) -> str:
    """What is computed in, for people."""
    return f"{precision} with products in fp8" if fp8 else precision


class Workload(Config):
    """What speed and memory depend on."""

    device: str
    gpus: int = 1
    zero_stage: Stage = 0
    model: ModelConfig
    seq_len: int
    micro_batch_rows: int
    """As accumulate, of each GPU."""

    accumulate: int
    precision: Precision
    fp8: bool = False
    compile: bool
    deterministic: bool
    document_mask: bool
    activation_checkpointing: Recompute

    @property
    def flops_per_token(self) -> int:
        return self.model.flops_per_token(self.seq_len)

    def is_computed_like(self, other: "Workload") -> bool:
        """Whether the same kernels do the same, in other sizes."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in type(self).model_fields
            if name not in ("model", "seq_len", "micro_batch_rows", "accumulate")
        )
