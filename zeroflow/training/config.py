"""TODO docstring."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from zeroflow.config import Config
from zeroflow.device import Device, Precision
from zeroflow.model.llama import ModelConfig, Recompute
from zeroflow.training.optimizers.choice import AnyOptimizer
from zeroflow.training.schedule import Schedule
from zeroflow.training.workload import Stage, Workload, arithmetic


class ComputeConfig(Config):
    """How the network is computed, alike in training and in the checks around it."""

    device: Literal["cpu", "cuda"]

    precision: Precision
    """bf16: matrices are multiplied and activations kept in bf16, weights and moments stay fp32."""

    fp8: bool = False
    """Multiply the matrices of the decoder blocks in 8 bits. The head, whose product is the loss's,
    stays in `precision`."""

    compile: bool
    """Compile the decoder blocks and the last norm with torch.compile."""

    deterministic: bool = False
    """Only kernels whose results are the same from run to run."""

    activation_checkpointing: Recompute = "none"
    """What is computed again in the backward pass: the activations within the feed-forward
    networks (selective), or all within a block (full)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def arithmetic(self) -> str:
        """For people."""
        return arithmetic(self.precision, fp8=self.fp8)


class TrainingConfig(Config):
    """What a training process needs to know about the mathematics of a run."""

    seed: NonNegativeInt
    micro_batch_rows: PositiveInt
    accumulate: PositiveInt
    """Micro-batches in a step, on every rank."""

    ranks: PositiveInt = 1
    """Processes that train together, each on a device of its own."""

    zero_stage: Stage = 0
    """What they share out."""

    document_mask: bool = False
    """Tokens see those of their own document only, and positions begin anew with it."""

    z_loss: NonNegativeFloat = 0.0
    """Weight of (log Z)² in the loss."""

    schedule: Schedule
    optimizer: AnyOptimizer
    compute: ComputeConfig

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def batch_rows(self) -> int:
        """Rows in a step, of all ranks."""
        return self.micro_batch_rows * self.accumulate * self.ranks


def workload(
    model: ModelConfig, seq_len: int, training: TrainingConfig, device: Device
) -> Workload:
    compute = training.compute
    return Workload(
        device=device.name,
        gpus=training.ranks,
        zero_stage=training.zero_stage,
        model=model,
        seq_len=seq_len,
        micro_batch_rows=training.micro_batch_rows,
        accumulate=training.accumulate,
        precision=compute.precision,
        fp8=compute.fp8,
        compile=compute.compile,
        deterministic=compute.deterministic,
        document_mask=training.document_mask,
        activation_checkpointing=compute.activation_checkpointing,
    )
