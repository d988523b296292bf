"""Record of the laboratory: contents of zero_lab.json."""

from typing import ClassVar

from pydantic import Field

from zeroflow.config import Config
from zeroflow.device import Precision
from zeroflow.records import Record, omitted
from zeroflow.training.zero import Offload, Stage


class Amount(Config):
    """Bytes of a part of the memory."""

    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Relative error of the prediction; 0 if there is nothing to predict."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted > 0)


class Collective(Config):
    """Collectives of one kind, in one step of one rank."""

    count: int
    bytes: int
    """Bytes of the whole buffers: the output of an all-gather, the input of the others."""

    predicted_count: int
    predicted_bytes: int

    @property
    def as_predicted(self) -> bool:
        return (self.count, self.bytes) == (self.predicted_count, self.predicted_bytes)


class ZeroStage(Config):
    """Memory, communication, speed and losses of a ZeRO stage, on each rank."""

    stage: Stage
    shard_group: int | None = omitted()
    """Ranks over which the state is sharded; None for all ranks."""

    offload: Offload = Field("none", exclude_if=lambda offload: offload == "none")
    """State that is in host memory instead of GPU memory."""

    memory: dict[str, Amount]
    """Largest bytes of each part of the memory in a step, and "peak", the largest of their sum; of
    the GPU if state is offloaded."""

    host: dict[str, Amount] | None = omitted()
    """Largest bytes of each part of the state in host memory; None if all is on the device."""

    collectives: dict[str, Collective]
    """Collectives of a step, by name."""

    tokens_per_second: float
    """Speed of all ranks together."""

    step_seconds: float
    """Median time of a step."""

    communication_seconds: float
    """Time of a step in which collectives are in progress."""

    exposed_seconds: float
    """The part of it in which nothing is computed."""

    max_loss_difference: float
    """Largest difference of a loss from that of one rank, in nats per token."""

    @property
    def name(self) -> str:
        return _name(self.stage, self.shard_group, self.offload)


def _name(stage: Stage, shard_group: int | None, offload: Offload) -> str:
    groups = f", groups of {shard_group}" if shard_group else ""
    return f"{stage}{groups}{'' if offload == 'none' else ', offloaded'}"


class StageOverLink(Config):
    """A step of a stage over links of a limited bandwidth."""

    stage: Stage
    step_seconds: float | None
    """Mean of the middle half of the measured times; None if the link cannot be limited."""

    predicted_step_seconds: float
    """The time without a limit, and the additional time of its collectives."""


class Link(Config):
    """Steps of all stages at one bandwidth."""

    gbps: float | None
    """10⁹ bits per second that a rank can send; None without a limit."""

    stages: tuple[StageOverLink, ...]


class Estimate(Config):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 if the interval is above 0, -1 if it is below, 0 if it includes 0."""
        return int(self.low > 0) - int(self.high < 0)


class StageDifference(Config):
    """Time by which a step of one stage is slower than that of another: a line over 1/bandwidth."""

    computed_seconds: Estimate
    """Value of the line at 0: the difference if bytes took no time."""

    moved_bytes: Estimate
    """Bytes, with headers of packets, that a rank sends more, from the slope of the line."""

    on_slowest: Estimate
    """Value of the line at the lowest bandwidth, in seconds."""

    on_fastest: Estimate
    """Value of the line at the highest bandwidth, in seconds."""

    crossover_gbps: Estimate | None
    """The bandwidth at which both are equally fast; None unless the intervals of the line at the
    lowest and the highest bandwidth say that different stages are faster there."""

    points: tuple[Estimate, ...]
    """Seconds at each bandwidth, which the line should explain."""


class StagePair(Config):
    """Two stages over bandwidths."""

    stage: Stage
    other: Stage
    """The stage of which `StageDifference` says how much slower it is."""

    measured: StageDifference | None
    """None if the link cannot be limited."""

    predicted: StageDifference


class SlowLinks(Config):
    """Steps over links of limited bandwidth."""

    own_gbps: float
    """Bandwidth of the link without a limit, in its largest collective."""

    compared_gbps: tuple[float, ...]
    """The bandwidths at which stages are compared: at most half of `own_gbps`."""

    links: tuple[Link, ...]
    pairs: tuple[StagePair, ...]
    """All pairs of stages; empty with fewer than two bandwidths to compare, or five steps."""

    @property
    def errors(self) -> list[float]:
        """Relative errors of the predicted times of steps."""
        return [
            one.predicted_step_seconds / one.step_seconds - 1
            for link in self.links
            if link.gbps is not None
            for one in link.stages
            if one.step_seconds is not None
        ]


class Largest(Config):
    """The largest micro-batch, or the largest model, of a stage under the cap."""

    micro_batch_rows: int
    blocks: int
    """Number of decoder blocks."""

    parameters: int
    peak: Amount
    """Bytes of a rank's tensors at the peak of a step."""

    peak_above: Amount
    """Bytes at the peak with one more row or block."""

    tokens_per_second: float
    """Speed of all ranks together."""

    def is_largest(self, cap: int) -> bool:
        """Return True if its measured peak is within the cap, and one more row or block is not."""
        return self.peak.measured <= cap < self.peak_above.measured


class StageFit(Config):
    """The largest micro-batch and the largest model of a stage under the cap."""

    stage: Stage
    shard_group: int | None = omitted()
    """Ranks over which the state is sharded; None for all ranks."""

    offload: Offload = Field("none", exclude_if=lambda offload: offload == "none")
    """State that is in host memory instead of GPU memory."""

    micro_batch: Largest | None
    """With the model of the run; None if not even one row fits."""

    model: Largest | None
    """With the micro-batch of the run, the model with the largest number of blocks; None if not
    even one block fits."""

    @property
    def name(self) -> str:
        return _name(self.stage, self.shard_group, self.offload)


class MemoryFit(Config):
    """The largest micro-batches and models under a cap of memory."""

    cap_bytes: int
    """Cap on the tensors of a rank."""

    stages: tuple[StageFit, ...]


class ZeroLab(Record):
    """Results of the laboratory: contents of zero_lab.json."""

    FORMAT: ClassVar[int] = 2
    """Format 1 had measured speed by bandwidth in `links`, and bandwidths at which measured times
    happened to cross in `crossovers`, which are no longer read."""

    device: str
    ranks: int
    parameters: int
    tokens_per_step: int
    micro_batches: int
    """Micro-batches of a step on each rank."""

    precision: Precision
    compiled: bool
    """True if losses and speed are those of compiled code. Memory and collectives are always those
    of eager code."""

    steps: int
    """Number of steps whose losses were compared."""

    noise_floor: float
    """Largest difference of a loss between two runs of one rank that split a step differently into
    micro-batches, and so differ only in rounding."""

    one_rank_tokens_per_second: float
    """Speed of one rank with the same batches; on a CPU with as many threads as each of several."""

    stages: tuple[ZeroStage, ...]
    slow_links: SlowLinks | None = omitted()
    """Speed by bandwidth, if --bandwidth-gbps was given."""

    fit: MemoryFit | None = omitted()
    """Largest micro-batches and models under a cap, if --memory-gb was given."""

    def volume(self, one: ZeroStage) -> float:
        """Return the values that a rank moves in a step, in parameters, as the paper counts.

        An all-reduce counts twice, because it scatters sums and gathers them. Sums of single
        numbers are left out.
        """
        widths = {
            "all_gather": 2 if self.precision == "bf16" else 4,
            "reduce_scatter": 4,
            "all_reduce": 4 / 2,
        }
        moved = (
            found.bytes / widths[name] for name, found in one.collectives.items() if name in widths
        )
        return sum(moved) / self.parameters

    @property
    def agrees(self) -> bool:
        """True if the losses of all stages are those of one rank, up to rounding."""
        return all(one.max_loss_difference <= self.tolerance for one in self.stages)

    @property
    def tolerance(self) -> float:
        """Largest difference of losses that rounding explains."""
        return max(1e-6 if self.precision == "fp32" else 0.0, 3 * self.noise_floor)
