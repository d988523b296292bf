"""The workload of training: everything that determines the cost and the mathematics of a step."""

from typing import Any, Self, get_args

import torch
from pydantic import Field, PositiveInt, model_validator

from zeroflow.config import Config
from zeroflow.data.batches import BatchShape, largest_divisor
from zeroflow.device import FP8_CAPABILITY, Device, DeviceKind, Precision
from zeroflow.model import fp8, hopper, llama
from zeroflow.model.llama import (
    ActivationCheckpointing,
    FusedFeedForward,
    Linear,
    ModelConfig,
)
from zeroflow.records import Record, omitted
from zeroflow.reuse import Identity
from zeroflow.training.optimizers.base import OptimizerConfig
from zeroflow.training.optimizers.choice import DEFAULT, AnyOptimizer
from zeroflow.training.zero import Offload, Stage

SETTING_NAMES = {
    "ranks": "gpus",
    "micro_batch_rows": "batch_size",
    "accumulate": "grad_accum_steps",
}
"""Settings of a run that determine fields of the workload with other names, by field."""


class Sharding(Record):
    """Number of ranks of a run, and their ZeRO stage."""

    gpus: int = 1
    """Number of ranks. Each has its own GPU, or all share the cores of a CPU."""

    zero_stage: Stage = 0
    shard_group: int | None = omitted()
    """Number of ranks over which the state is sharded; None for all."""

    reshard_group: int | None = omitted()
    """Number of ranks over which weights of blocks are sharded between the forward and the backward
    pass; None for all ranks of a shard group."""

    @property
    def ranks(self) -> int:
        return self.gpus

    @property
    def zero(self) -> str:
        """The stage as text, with the numbers of ranks of its groups, if any."""
        if self.ranks == 1:
            return "none"
        groups = f" x {self.shard_group}" if self.shard_group else ""
        groups += f", reshard {self.reshard_group}" if self.reshard_group else ""
        return str(self.zero_stage) + groups


class Workload(Config):
    """A training step: the network, its batch, its optimiser, and how and where it is computed.

    The plan, the training, the history and the report all use this object.
    """

    device: DeviceKind

    device_name: str
    """Name of the device, for example NVIDIA H200."""

    ranks: PositiveInt = 1
    """Number of processes that train together, each on its own GPU, or all on one CPU."""

    nodes: PositiveInt = Field(1, exclude_if=lambda nodes: nodes == 1)
    """Number of machines, with equally many ranks on each; left out of files if it is 1."""

    zero_stage: Stage = 0
    """ZeRO stage: the state that the ranks shard, see `zero.STAGES`."""

    shard_group: PositiveInt | None = Field(None, exclude_if=lambda ranks: ranks is None)
    """Number of ranks over which the state is sharded; groups are replicas. None for all ranks."""

    reshard_group: PositiveInt | None = Field(None, exclude_if=lambda ranks: ranks is None)
    """Number of ranks over which gathered weights of blocks stay sharded between the forward and
    the backward pass at stage 3; None for all ranks of a shard group."""

    offload: Offload = Field("none", exclude_if=lambda offload: offload == "none")
    """State that is in host memory instead of GPU memory."""

    model: ModelConfig

    seq_len: PositiveInt
    """Tokens of context."""

    micro_batch_rows: PositiveInt
    """Number of rows of one forward pass on one rank."""

    accumulate: PositiveInt
    """Number of micro-batches of one step on each rank."""

    precision: Precision
    """bf16: products and activations are bf16; weights, moments and gradients stay fp32."""

    fp8: bool = False
    """Compute products in 8 bits: those of the decoder blocks, and those of the loss if
    `can_round_loss` and if this was measured to be faster."""

    compile: bool
    """Compile the decoder blocks and the last norm with torch.compile."""

    deterministic: bool = False
    """Use only kernels that give the same bits in every run."""

    document_mask: bool = False
    """Attention stays within a document, and positions restart with each document."""

    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations to recompute in the backward pass: those of the feed-forward networks (selective)
    or all activations of a block (full)."""

    optimizer: AnyOptimizer = DEFAULT

    @property
    def rank_rows(self) -> int:
        """Number of rows of one step on one rank."""
        return self.micro_batch_rows * self.accumulate

    @property
    def batch_rows(self) -> int:
        """Number of rows of the global batch."""
        return self.rank_rows * self.ranks

    @property
    def batch_tokens(self) -> int:
        """Number of tokens of the global batch."""
        return self.batch_rows * self.seq_len

    @property
    def batch_shape(self) -> BatchShape:
        return BatchShape(self.accumulate, self.ranks, self.micro_batch_rows)

    @property
    def is_sharded(self) -> bool:
        """True if FSDP2 shards the model: over several ranks, or to offload the state of one."""
        return self.ranks > 1 or self.offload != "none"

    @property
    def shards(self) -> int:
        """Number of shards of the state, each on one rank of a group."""
        if self.zero_stage == 0:
            return 1
        group = self.shard_group
        return group if group and self.ranks % group == 0 else self.ranks

    @property
    def reshard(self) -> bool | int:
        """FSDP2's `reshard_after_forward` for a block: False keeps its weights gathered for the
        backward pass, True only this rank's shard, and a number its shard of so many ranks.
        """
        group = self.reshard_group
        if self.zero_stage == 3 and group and group < self.shards and self.shards % group == 0:
            return group
        return self.zero_stage == 3

    @property
    def accumulates(self) -> bool:
        """True if a step sums the gradients of several micro-batches."""
        return self.accumulate > 1

    @property
    def dtype(self) -> torch.dtype:
        """Data type of activations and products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def linear(self) -> Linear:
        """The function that computes the products of the decoder blocks."""
        return fp8.linear if self.fp8 else llama.linear

    @property
    def fused_feed_forward(self) -> FusedFeedForward:
        """The feed-forward network that computes SwiGLU without separate passes over memory."""
        return fp8.swiglu if self.fp8 else hopper.swiglu

    @property
    def can_fuse_feed_forward(self) -> bool:
        """True if a GPU with Triton can compute `fused_feed_forward` without another package."""
        return self.fp8 and self.model.intermediate_size <= fp8.MAX_INTERMEDIATE_SIZE

    @property
    def can_round_loss(self) -> bool:
        """True if the products of the output head and of its gradients may be in 8 bits too."""
        return self.fp8 and self.model.vocab_size % fp8.MULTIPLE == 0

    @property
    def attends_to_rows(self) -> bool:
        """True if a token attends to all tokens before it in its row."""
        return not self.document_mask

    @property
    def significand_bits(self) -> int:
        """Precision of the factors in the products of the decoder blocks."""
        return 4 if self.fp8 else 8 if self.precision == "bf16" else 24

    @property
    def arithmetic(self) -> str:
        """Number formats as text."""
        return f"{self.precision} with products in fp8" if self.fp8 else self.precision

    @property
    def peak(self) -> str:
        """The peak of the device to which utilisation is relative, as text."""
        return "dense bf16 peak" + (" (that of fp8 is twice as high)" if self.fp8 else "")

    @property
    def sharding(self) -> Sharding:
        return Sharding(
            gpus=self.ranks,
            zero_stage=self.zero_stage,
            shard_group=self.shard_group,
            reshard_group=self.reshard_group,
        )

    @property
    def devices(self) -> str:
        """Devices as text, for example 2 x NVIDIA H200, ZeRO stage 3."""
        offloaded = "" if self.offload == "none" else ", offloaded"
        if self.ranks == 1:
            stage = f", ZeRO stage {self.zero_stage}{offloaded}" if offloaded else ""
            return f"{self.device_name}{stage}"
        times = "processes on one" if self.device == "cpu" else "x"
        machines = f" on {self.nodes} machines" if self.nodes > 1 else ""
        groups = f" in groups of {self.shards}" if 1 < self.shards < self.ranks else ""
        kept = f", resharded to {self.reshard}" if type(self.reshard) is int else ""
        stage = f"ZeRO stage {self.zero_stage}{groups}{kept}{offloaded}"
        return f"{self.ranks} {times} {self.device_name}{machines}, {stage}"

    @property
    def on_one_machine(self) -> Self:
        """The same step on the ranks of one machine, with the same number of rows per rank."""
        return self.replace(ranks=self.ranks // self.nodes, nodes=1)

    def on_machines(self, nodes: int) -> Self:
        """Return the step with the same global batch on `nodes` machines.

        Raises:
            ValueError: their ranks cannot share its rows evenly.
        """
        ranks = self.ranks // self.nodes * nodes
        rows, left = divmod(self.batch_rows, ranks)
        if left:
            raise ValueError(
                f"{ranks} ranks of {nodes} machines cannot share the {self.batch_rows} rows of a "
                "step evenly: raise --min-nodes, or, for a new run, use another --batch-tokens"
            )
        return self.replace(ranks=ranks, nodes=nodes, accumulate=1, micro_batch_rows=rows).split(
            self.micro_batch_rows
        )

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward and backward pass."""
        return self.model.flops_per_token(self.seq_len)

    @property
    def mathematics(self) -> tuple[ModelConfig, int, int, bool, OptimizerConfig]:
        """The fields that determine the loss; the others affect only its rounding."""
        return self.model, self.seq_len, self.batch_rows, self.document_mask, self.optimizer

    def costs_as_much_as(self, other: Self) -> bool:
        """Return True if a step takes the same time and memory, ignoring optimiser settings."""
        same_kind = self.optimizer.name == other.optimizer.name
        return same_kind and self.replace(optimizer=other.optimizer) == other

    def is_computed_like(self, other: Self) -> bool:
        """Return True if the same kernels run on the same devices, ignoring model and batch."""
        sizes = ("model", "seq_len", "micro_batch_rows", "accumulate")
        resized = self.replace(**{name: getattr(other, name) for name in sizes})
        return resized.costs_as_much_as(other)

    def split(self, limit: int) -> Self:
        """Return the same step in the largest equal micro-batches of at most `limit` rows."""
        rows = largest_divisor(self.rank_rows, limit)
        return self.replace(micro_batch_rows=rows, accumulate=self.rank_rows // rows)

    def require_possible_on(self, device: Device) -> None:
        """Check that `device` can compute this step in its number formats.

        Raises:
            ValueError: the device cannot.
        """
        if not self.fp8:
            return
        needed = ".".join(map(str, FP8_CAPABILITY))
        if device.capability is None:
            raise ValueError(
                f"--fp8 needs a GPU of compute capability {needed} or more, but the device is a "
                f"CPU ({device.name}): train on such a GPU, or drop --fp8"
            )
        if device.capability < FP8_CAPABILITY:
            raise ValueError(
                f"--fp8 needs compute capability {needed} or more, such as Ada or Hopper, but "
                f"{device.name} has {'.'.join(map(str, device.capability))}: train on another GPU, "
                "or drop --fp8"
            )
        if self.precision == "fp32":
            raise ValueError("--fp8 needs bf16, but --precision is fp32: drop one of them")
        sides = {
            "--hidden-size": self.model.hidden_size,
            "--intermediate-size": self.model.intermediate_size,
            "the joined size of the queries": self.model.query_size,
            "the joined size of queries, keys and values": self.model.qkv_size,
            "--seq-len": self.seq_len,
        }
        for name, side in sides.items():
            if side % fp8.MULTIPLE:
                raise ValueError(
                    f"--fp8 needs matrices whose sides are multiples of {fp8.MULTIPLE}, but "
                    f"{name} is {side}: change it, or drop --fp8"
                )

    # Files written before format 2

    @model_validator(mode="before")
    @classmethod
    def _from_format_1(cls, fields: Any) -> Any:
        """Read a plan: its `device` was the name of the device, and `gpus` the number of ranks."""
        if not isinstance(fields, dict) or fields.get("device") in (None, *get_args(DeviceKind)):
            return fields
        fields = {"ranks": fields.get("gpus", 1)} | fields
        name = fields["device"]
        kind: DeviceKind = "cpu" if "CPU" in name else "cuda"
        return {n: v for n, v in fields.items() if n != "gpus"} | {
            "device": kind,
            "device_name": name,
        }

    @property
    def in_format_1(self) -> Identity:
        """The fields except model, context, device name and optimiser, nested as in format 1.

        Checks are identified by a hash of this. It keeps the old nesting, so that checks that an
        earlier version has passed are not repeated.
        """
        left_out = {"model", "seq_len", "device_name", "optimizer"}
        fields = self.model_dump(mode="json", exclude=left_out)
        outer = ("micro_batch_rows", "accumulate", "ranks", "zero_stage", "document_mask")
        return {name: fields.pop(name) for name in outer} | {"compute": fields}
