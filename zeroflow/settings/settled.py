"""Settled settings of a run: every setting that training reads has a value."""

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from zeroflow import artifacts
from zeroflow.data.corpus import corpus_identity
from zeroflow.data.shards import ShardConfig
from zeroflow.device import Device, Precision
from zeroflow.model.llama import ActivationCheckpointing, ModelConfig
from zeroflow.model.sizes import with_vocabulary
from zeroflow.settings.run_config import RunConfig, TrainingChoice
from zeroflow.tracking.config import is_server, location
from zeroflow.training import kernels
from zeroflow.training.config import TrainingConfig
from zeroflow.training.initial import Initial
from zeroflow.training.job import Cadence
from zeroflow.training.retention import Retention
from zeroflow.training.sampling import SamplingConfig
from zeroflow.training.schedule import Schedule
from zeroflow.training.zero import Stage


class SettledTraining(TrainingChoice):
    """Training settings without open values."""

    gpus: PositiveInt = 1
    zero_stage: Stage = 0
    seq_len: int
    batch_size: PositiveInt
    grad_accum_steps: PositiveInt
    batch_tokens: PositiveInt
    max_steps: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt
    precision: Precision
    compile: bool
    deterministic: bool
    validation_tokens: PositiveInt
    validate_every: PositiveInt
    checkpoint_every: PositiveInt
    activation_checkpointing: ActivationCheckpointing
    log_interval: PositiveInt
    sample_prompt: str

    @property
    def sharding(self) -> tuple[str, ...]:
        """Words that describe how the state is sharded and offloaded; none if it is neither."""
        if self.ranks == 1 and self.offload == "none":
            return ()
        gpus = (f"{self.ranks}gpus",) if self.ranks > 1 else ()
        offload = () if self.offload == "none" else ("offload",)
        group = (f"group{self.shard_group}",) if self.shard_group else ()
        reshard = (f"reshard{self.reshard_group}",) if self.reshard_group else ()
        return (*gpus, f"zero{self.zero_stage}", *group, *reshard, *offload)


class Settled(RunConfig):
    """All settings that define a run, settled: contents of `run.json`."""

    run_name: str

    device: Literal["cpu", "cuda"]
    training: SettledTraining
    initial: Initial | None = Field(None, exclude_if=lambda initial: initial is None)
    """The model of `--init-from`; None for random weights."""

    no_flags: ClassVar[tuple[str, ...]] = ("initial",)

    def network(self, vocab_size: int) -> ModelConfig:
        """Return the configuration of the network for a tokenizer of `vocab_size` tokens.

        Raises:
            ValueError: the initial model has fewer tokens.
        """
        if self.initial is None:
            return with_vocabulary(self.model.shape, vocab_size)
        model = self.initial.model
        if vocab_size > model.vocab_size:
            raise ValueError(
                f"--init-from {self.model.init_from} has {model.vocab_size:,} rows in its "
                f"embedding, fewer than the {vocab_size:,} tokens of its tokenizer: remove the "
                "tokens that were added to the tokenizer"
            )
        return model

    @property
    def fell_back(self) -> bool:
        """True if synthetic data replaces FineWeb-Edu."""
        return self.data.allow_synthetic_fallback and self.data.data_mode == "synthetic"

    @property
    def ranks(self) -> int:
        """Number of ranks that train together."""
        return self.training.ranks

    @property
    def tags(self) -> dict[str, str]:
        """Settings by which MLflow's pages filter and group runs."""
        return {
            "size": self.model.name,
            "source": self.data.name,
            "gpus": str(self.ranks),
            "zero_stage": str(self.training.zero_stage),
            "max_steps": str(self.training.max_steps),
            "synthetic_fallback": str(self.fell_back).lower(),
        }

    @property
    def batch_rows(self) -> int:
        """Number of rows of a global batch."""
        choice = self.training
        return choice.batch_size * choice.grad_accum_steps * self.ranks

    @property
    def validation_rows(self) -> int:
        """Number of held-out rows of a validation."""
        return max(1, self.training.validation_tokens // self.training.seq_len)

    @property
    def train_tokens(self) -> int:
        """Number of tokens that the run trains on."""
        return self.training.max_steps * self.batch_rows * self.training.seq_len

    @property
    def held_out(self) -> str:
        """Fingerprint of the text for validation; losses of runs with the same one compare."""
        data = self.data.validation or self.data
        text: dict[str, object] = {
            **corpus_identity(data),
            "deduplicate": data.deduplicate,
            "tokens": self.training.validation_tokens,
        }
        if not self.data.validation:
            text["fraction"] = self.training.validation_fraction
        return artifacts.fingerprint(text)

    @property
    def shard_config(self) -> ShardConfig:
        return ShardConfig(
            seq_len=self.training.seq_len,
            train_rows=self.training.max_steps * self.batch_rows,
            validation_rows=self.validation_rows,
            validation_fraction=self.training.validation_fraction,
            token_type=self.training.token_type,
            packing=self.training.packing,
        )

    @property
    def schedule(self) -> Schedule:
        """Return the learning rate's schedule.

        Raises:
            ValueError: warm-up and steps contradict each other.
        """
        return Schedule(
            name=self.training.schedule,
            peak=self.training.learning_rate,
            warmup_steps=self.training.warmup_steps,
            steps=self.training.max_steps,
        )

    def training_config(self, model: ModelConfig, device: Device) -> TrainingConfig:
        return TrainingConfig(
            seed=self.seed,
            workload=self.workload(model, device),
            z_loss=self.training.z_loss,
            schedule=self.schedule,
        )

    @property
    def cadence(self) -> Cadence:
        return Cadence(
            log=self.training.log_interval,
            validate_=self.training.validate_every,
            checkpoint=self.training.checkpoint_every,
        )

    @property
    def retention(self) -> Retention:
        return Retention(keep=self.training.keep_checkpoints, keep_every=self.training.keep_every)

    @property
    def most_checkpoints(self) -> int:
        """Maximum number of checkpoints that exist at once."""
        return self.retention.most_at_once(self.training.max_steps, every=self.cadence.checkpoint)

    @property
    def stores_models(self) -> bool:
        """True if this machine stores registered models; an MLflow server stores them elsewhere."""
        return self.register_ is not None and not is_server(location(self.cache_dir)[0])

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(tokens=self.training.sample_tokens)

    @property
    def resume_promise(self) -> str:
        """Description of how exact a resume of this run is."""
        promise = _promise_of_one(self)
        if self.ranks > 1:
            promise += "; with another number of GPUs the order of summation differs"
        return promise


def _promise_of_one(run: Settled) -> str:
    if run.device == "cpu":
        return "bit for bit"
    if run.training.deterministic:
        return "bit for bit, because kernels are deterministic"
    return (
        "the same data, random numbers and weights; kernels differ in the last bits between runs "
        "(not with --deterministic, which costs 3-10 % of the speed, or about 1 % on Hopper GPUs "
        f"with {kernels.EXTRA})"
    )


class Settlement(NamedTuple):
    """Settled settings of a run, with the reasons for choices that depend on the outside world."""

    run: Settled
    device: Device
    resumes: bool
    """True if a run of this name already existed."""

    corpus_reason: str
    tokenizer_reason: str
