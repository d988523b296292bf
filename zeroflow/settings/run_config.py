"""The settings of a run as they are asked for.

`RunConfig` makes the command line, the Prefect form, MLflow's params and `run.json`. A setting
that is None depends on the device or on the outside world; `settle` decides it, and the result is
another type, `settled.Settled`, in which it has a value.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from zeroflow.checks.overfit import OverfitConfig
from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.packing import PackingName
from zeroflow.data.tokenizer import SYNTHETIC_TOKENIZER, TokenizerConfig
from zeroflow.device import Precision
from zeroflow.model.llama import Recompute, Shape
from zeroflow.model.sizes import SIZES, SizeName
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.training.config import Stage
from zeroflow.training.optimizers.choice import DEFAULT, AnyOptimizer
from zeroflow.training.schedule import ScheduleName

DEFAULT_CACHE = Path("data_cache")


T = TypeVar("T")


class ModelChoice(Config):
    """The network: a size by name, or a shape of your own given in full."""

    size: SizeName | None = None
    """tiny ~46M, small ~318M, medium ~1.34B parameters at Llama-3.1's vocabulary. Default: tiny."""

    hidden_size: PositiveInt | None = None
    """Features per token, of a shape of your own."""

    num_hidden_layers: PositiveInt | None = None
    """Decoder blocks, of a shape of your own."""

    num_attention_heads: PositiveInt | None = None
    """Query heads, of a shape of your own."""

    num_key_value_heads: PositiveInt | None = None
    """Key/value heads, of a shape of your own."""

    intermediate_size: PositiveInt | None = None
    """Features inside the feed-forward network, of a shape of your own."""

    @model_validator(mode="after")
    def _size_or_shape(self) -> Self:
        given = {name: getattr(self, name) for name in Shape.model_fields}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) < len(given):
            if self.size is not None:
                raise ValueError(f"size {self.size} and a shape of your own: give one of them")
            if missing:
                raise ValueError(f"a shape of your own needs {', '.join(missing)} as well")
            Shape(**given)
        return self

    @property
    def settled(self) -> Self:
        """With the default written out."""
        return self if self.size or self.hidden_size else self.replace(size="tiny")

    @property
    def shape(self) -> Shape:
        if self.hidden_size is None:
            return SIZES[self.size or "tiny"]
        return Shape(**{name: getattr(self, name) for name in Shape.model_fields})

    @property
    def name(self) -> str:
        return (self.size or "tiny") if self.hidden_size is None else "custom"


class TrainingChoice(Config):
    """The training. What is not given depends on the device and the size, and is printed."""

    gpus: PositiveInt | None = None
    """GPUs of this machine that train together; with device cpu, processes that share the cores.
    Default: 1."""

    zero_stage: Stage | None = None
    """What several GPUs share out: 0 nothing but the rows, 1 moments and weights, 2 gradients too,
    3 weights also while they are used. Default: 0."""

    seq_len: int | None = Field(None, ge=2)
    """Tokens of context. Default: 256 on a CPU, 2048 on a GPU."""

    batch_size: PositiveInt | None = None
    """Rows in a micro-batch, of each GPU. Default: what its memory holds."""

    grad_accum_steps: PositiveInt | None = None
    """Micro-batches in a step, of each GPU. Default: batch_tokens / (batch_size x seq_len x
    gpus)."""

    batch_tokens: PositiveInt | None = None
    """Tokens in a step. Default: 512 on a CPU; 0.25M / 0.5M / 1M on a GPU for tiny / small /
    medium."""

    max_steps: PositiveInt | None = None
    """Steps of the optimiser. Default: 200 on a CPU, some minutes for tiny; 20 tokens a parameter
    on a GPU."""

    learning_rate: PositiveFloat | None = None
    """Peak. Default: 3e-3 / 2e-3 / 1e-3 for tiny / small / medium; a third on a CPU, for its small
    batches."""

    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up. Default: 2 % of max_steps, 10 % of a short run."""

    schedule: ScheduleName = "cosine"
    """Decay after the warm-up: cosine to 0, or wsd, constant with the last 20 % linear to 0."""

    precision: Precision | None = None
    """bf16 computes in bf16 with fp32 master weights. Default: fp32 on a CPU, bf16 on a GPU."""

    fp8: bool = False
    """Multiply the matrices of the decoder blocks in 8 bits, on Ada, Hopper and newer GPUs. On an
    H100 it made medium 15 % faster, small 1 %, and tiny 5 % slower."""

    compile: bool | None = None
    """Compile the decoder blocks with torch.compile. Default: on a GPU."""

    document_mask: bool = False
    """Attention stays within a document, and positions begin anew with it."""

    z_loss: NonNegativeFloat = 0.0
    """Adds so much of the squared log of the softmax's denominator to the loss; 1e-5 is usual, and
    keeps logits from drifting. Validation losses are without it."""

    validation_tokens: PositiveInt | None = None
    """Held-out tokens in a validation. Default: 8K on a CPU, 1M on a GPU."""

    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the documents that is kept for validation."""

    token_type: Literal["int32", "uint16"] = "int32"
    """Integer type of the shards; uint16 halves them, for vocabularies up to 65,536."""

    packing: PackingName = "best-fit"
    """best-fit cuts only documents longer than a row, and fills what stays short with padding that
    the loss ignores; concat joins documents end to end and cuts wherever a row is full."""

    validate_every: PositiveInt | None = None
    """Steps between validations. Default: half of a CPU run, 250 on a GPU."""

    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints. Default: a fifth of the run, at most 250."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep. The one with the lowest validation loss stays as well."""

    keep_every: PositiveInt | None = None
    """And those at multiples of so many steps. Default: none."""

    deterministic: bool = False
    """On a GPU, take only kernels whose results are the same from run to run, so that a run that
    was interrupted ends with the same bits, at the price of some speed. A CPU's always are."""

    activation_checkpointing: Recompute | None = None
    """Computes activations again in the backward pass, which saves memory and takes time: selective
    those within the feed-forward networks, full all. Default: the first of none, selective and full
    with which a row fits."""

    on_spike: Literal["report", "roll-back"] = "report"
    """What to do at a loss, gradient norm or update that is far from usual: say so, or go back to
    the newest checkpoint and leave out the data since."""

    hang_seconds: PositiveInt = 3600
    """Without a finished step, after which training is taken for hung and started again."""

    log_interval: PositiveInt | None = None
    """Steps between logged losses. Default: 5 on a CPU, 10 on a GPU."""

    sample_prompt: str | None = None
    """Beginning of the text sample at each validation. Default: fits the data."""

    sample_tokens: PositiveInt = 48
    """Tokens of the text sample."""


class BuildChoice(Config):
    """How shards are built. Changes the time it takes, and not a byte."""

    data_workers: PositiveInt = 2
    """Parts to build at once. Two keep two cores busy; more help on more cores, or where reading is
    slow."""

    data_runner: Literal["threads", "dask"] = "threads"
    """Where parts are built if there are several: in this process, or on Dask workers."""

    dask_address: str | None = None
    """Scheduler of a running Dask cluster, which shares the cache's folder. Default: a cluster of
    data_workers processes on this machine."""

    @model_validator(mode="after")
    def _address_belongs_to_dask(self) -> Self:
        if self.dask_address and self.data_runner != "dask":
            raise ValueError("dask_address is used with data_runner dask only: add it")
        return self


class RunConfig(Config):
    """Everything that defines a run."""

    run_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """A run of the same name goes on where it stopped. Default: made from the settings, so that the
    same command goes on as well."""

    sweep: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    """Sweep that the run is a part of, which MLflow shows it in."""

    cache_dir: Path = DEFAULT_CACHE
    """Folder of everything that is written: tokenizers, shards, runs, mlflow."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    seed: NonNegativeInt = 0
    """Of weights, data order and synthetic data."""

    skip_preflight: bool = False
    """Train without the checks before it."""

    model: ModelChoice = ModelChoice()
    data: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    build: BuildChoice = BuildChoice()
    training: TrainingChoice = TrainingChoice()
    optimizer: AnyOptimizer = DEFAULT
    overfit: OverfitConfig = OverfitConfig()

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.data.data_mode == "synthetic" and self.tokenizer.tokenizer_name not in (
            "auto",
            SYNTHETIC_TOKENIZER,
        ):
            raise ValueError(
                "synthetic data is token ids and takes no tokenizer: drop --tokenizer-name, and "
                "set --vocab-size if you like"
            )
        return self

    @property
    def folder(self) -> RunFolder:
        assert self.run_name is not None, "settle() names the run"
        return Cache(self.cache_dir).run(self.run_name)

    @property
    def run_dir(self) -> Path:
        return self.folder.path

    @property
    def anywhere(self) -> Self:
        """With paths that mean the same from every working directory; else as it was given."""
        changes: dict[str, Any] = {"cache_dir": self.cache_dir.absolute()}
        if self.data.data_path:
            paths = tuple(str(Path(p).expanduser().absolute()) for p in self.data.data_path)
            changes["data"] = self.data.model_copy(update={"data_path": paths})
        return self.model_copy(update=changes)


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every single setting as ("group.name", value)."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
