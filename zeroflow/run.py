"""The settings of a run: what was asked for, and how what was left open is settled, once.

`RunConfig` makes the command line, the Prefect form, MLflow's params and `run.json`. A setting
that is None depends on the device or on the outside world; `settle` fills it, and what it chose is
recorded, so that a run goes on with the same settings wherever and whenever it is resumed.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from zeroflow import artifacts, planning, reuse, tracking
from zeroflow.checks.overfit import OverfitConfig
from zeroflow.config import Config
from zeroflow.data import corpus as corpora
from zeroflow.data import tokenizer as tokenizers
from zeroflow.data.batches import largest_divisor
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.packing import PackingName
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.data.tokenizer import TokenizerConfig, TokenizerFiles
from zeroflow.generate import SamplingConfig
from zeroflow.model.llama import ModelConfig, Recompute, Shape
from zeroflow.model.sizes import SIZES, SizeName, with_vocabulary
from zeroflow.planning import Device, Precision, Stage
from zeroflow.reuse import Fields
from zeroflow.tracking import TrackingConfig
from zeroflow.training import checkpoint
from zeroflow.training.checkpoint import Retention
from zeroflow.training.job import CHECKPOINTS, Cadence, TrainingJob
from zeroflow.training.loop import ComputeConfig, TrainingConfig
from zeroflow.training.optimizer import OptimizerConfig
from zeroflow.training.schedule import Schedule, ScheduleName

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
ASKED_FILE = "asked.json"
"""What was asked for when the run was started and settled otherwise: branches, fallbacks."""

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
    optimizer: OptimizerConfig = OptimizerConfig()
    overfit: OverfitConfig = OverfitConfig()

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.data.data_mode == "synthetic" and self.tokenizer.tokenizer_name not in (
            "auto",
            tokenizers.SYNTHETIC,
        ):
            raise ValueError(
                "synthetic data is token ids and takes no tokenizer: drop --tokenizer-name, and "
                "set --vocab-size if you like"
            )
        return self

    @property
    def run_dir(self) -> Path:
        assert self.run_name is not None, "settle() names the run"
        return self.cache_dir / "runs" / self.run_name

    @property
    def anywhere(self) -> Self:
        """With paths that mean the same from every working directory; else as it was given."""
        changes: dict[str, Any] = {"cache_dir": self.cache_dir.absolute()}
        if self.data.data_path:
            paths = tuple(str(Path(p).expanduser().absolute()) for p in self.data.data_path)
            changes["data"] = self.data.model_copy(update={"data_path": paths})
        return self.model_copy(update=changes)

    @property
    def fell_back(self) -> bool:
        """Whether synthetic data stands in for FineWeb-Edu."""
        return self.data.allow_synthetic_fallback and self.data.data_mode == "synthetic"

    @property
    def batch_rows(self) -> int:
        """Rows in a step."""
        choice = self.training
        of_each = _known(choice.batch_size) * _known(choice.grad_accum_steps)
        return of_each * (choice.gpus or 1)  # of versions that knew one only, None

    @property
    def validation_rows(self) -> int:
        """Rows in a validation."""
        return max(1, _known(self.training.validation_tokens) // _known(self.training.seq_len))

    @property
    def train_tokens(self) -> int:
        """Tokens trained on."""
        steps = _known(self.training.max_steps)
        return steps * self.batch_rows * _known(self.training.seq_len)

    @property
    def shard_config(self) -> ShardConfig:
        return ShardConfig(
            seq_len=_known(self.training.seq_len),
            train_rows=_known(self.training.max_steps) * self.batch_rows,
            validation_rows=self.validation_rows,
            validation_fraction=self.training.validation_fraction,
            token_type=self.training.token_type,
            packing=self.training.packing,
        )

    @property
    def training_config(self) -> TrainingConfig:
        choice = self.training
        assert self.device != "auto"
        return TrainingConfig(
            seed=self.seed,
            micro_batch_rows=_known(choice.batch_size),
            accumulate=_known(choice.grad_accum_steps),
            ranks=choice.gpus or 1,
            zero_stage=choice.zero_stage or 0,
            schedule=Schedule(
                name=choice.schedule,
                peak=_known(choice.learning_rate),
                warmup_steps=_known(choice.warmup_steps),
                steps=_known(choice.max_steps),
            ),
            document_mask=choice.document_mask,
            z_loss=choice.z_loss,
            optimizer=self.optimizer,
            compute=ComputeConfig(
                device=self.device,
                precision=_known(choice.precision),
                fp8=choice.fp8,
                compile=_known(choice.compile),
                deterministic=choice.deterministic,
                activation_checkpointing=_known(choice.activation_checkpointing),
            ),
        )

    @property
    def cadence(self) -> Cadence:
        return Cadence(
            log=_known(self.training.log_interval),
            validate_=_known(self.training.validate_every),
            checkpoint=_known(self.training.checkpoint_every),
        )

    @property
    def retention(self) -> Retention:
        return Retention(keep=self.training.keep_checkpoints, keep_every=self.training.keep_every)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(tokens=self.training.sample_tokens)


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every single setting as ("group.name", value)."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class Settled(NamedTuple):
    run: RunConfig
    """Nothing in it is None that training reads."""

    training: TrainingConfig
    device: Device
    resumes: bool
    """Whether a run of this name was started before."""

    data_reason: str
    """Why this data."""

    tokenizer_reason: str
    """Why this tokenizer."""


# Settings that may change when a run goes on: they touch no weight
_FREE = {"cache_dir", "device", "sweep", "data.data_path", "data.allow_synthetic_fallback"} | {
    f"training.{name}"
    for name in (
        "batch_size",  # with grad_accum_steps and gpus: only their product is mathematics
        "grad_accum_steps",
        "gpus",
        "zero_stage",
        "validate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "activation_checkpointing",
        "on_spike",
        "hang_seconds",
        "log_interval",
        "sample_prompt",
        "sample_tokens",
    )
}
_FREE |= {f"build.{name}" for name in BuildChoice.model_fields} | {"data.bad_lines_limit"}
_FREE |= {"overfit.overfit_steps", "overfit.overfit_loss", "skip_preflight"}


def settle(asked: RunConfig, own: Callable[[Path], None] = lambda run_dir: None) -> Settled:
    """Fill what `asked` leaves open, name the run, and record it in its run.json.

    What a run of the same name has recorded comes before any default.

    Args:
        own: called with the run's directory before anything in it is changed; raises an error
            where another process is at work there.

    Raises:
        ValueError: settings contradict each other, the device, or those of the run of this name.
        hub.HubError: the hub is needed and refused or is out of reach.
    """
    _refuse_what_does_nothing(asked)
    if before := _recorded(asked):
        own(before.run_dir)
    recorded = _recorded(asked)
    merged = _over(recorded, asked) if recorded else asked
    merged = merged.replace(model=merged.model.settled)
    if different := started_otherwise(asked):
        raise ValueError(
            f"run {merged.run_name} was started with {different}: use another --run-name, or the "
            "former setting"
        )
    if recorded and _difference(recorded, merged):
        # Nothing has been trained: the run begins anew, so that a remedy can be tried
        for of_before in (RUN_FILE, ASKED_FILE, tracking.LEDGER):
            (recorded.run_dir / of_before).unlink(missing_ok=True)
        tracking.forget(recorded.run_dir)
        recorded, merged = None, asked.replace(model=asked.model.settled)
    device = planning.find_device(merged.device)
    planning.require_gpus(merged.training.gpus or 1, device, wanted=merged.device)
    _refuse_what_the_device_cannot(merged, device)
    data, data_reason = corpora.resolve(merged.data)
    tokenizer, tokenizer_reason = tokenizers.resolve(merged.tokenizer, data, merged.cache_dir)
    run = merged.replace(
        device=device.kind,
        data=data,
        tokenizer=tokenizer,
        training=_fill(merged.training, merged.model, data, device),
    )
    if run.run_name is None:
        run = run.replace(run_name=_default_name(run))
    training = run.training_config  # a contradiction shows here, before anything is recorded
    own(run.run_dir)
    named = asked.model_copy(update={"run_name": run.run_name})
    if not recorded and _recorded(named):
        return settle(named, own)  # the same command again, or at the same time
    if recorded:
        data_reason = tokenizer_reason = "as the run was started"
    else:
        otherwise = _without(_given(asked), run.model_dump(mode="json"))
        artifacts.write_json(run.run_dir / ASKED_FILE, otherwise)
    artifacts.write_json(run.run_dir / RUN_FILE, run.model_dump(mode="json"))
    return Settled(run, training, device, recorded is not None, data_reason, tokenizer_reason)


def started_otherwise(asked: RunConfig) -> str | None:
    """What is asked of a run and cannot be changed any more, as it has been trained; else None."""
    recorded = _recorded(asked)
    if recorded is None or not checkpoint.newest_step(recorded.run_dir / CHECKPOINTS):
        return None
    merged = _over(recorded, asked)
    return _difference(recorded, merged.replace(model=merged.model.settled)) or None


def sketch(asked: RunConfig, device: Device) -> RunConfig:
    """`asked` with what follows from the device filled in; looks nothing up, records nothing.

    What a run of the same name has recorded comes before any default.

    Raises:
        ValueError: settings contradict each other.
    """
    _refuse_what_does_nothing(asked)
    recorded = _recorded(asked)
    merged = _over(recorded, asked) if recorded else asked
    merged = merged.replace(device=device.kind, model=merged.model.settled)
    _refuse_what_the_device_cannot(merged, device)
    return merged.replace(training=_fill(merged.training, merged.model, merged.data, device))


def load(cache: Path, name: str) -> RunConfig:
    """The settled settings of an existing run.

    Raises:
        ValueError: there is no run of this name; the message lists those there are.
    """
    path = cache / "runs" / name / RUN_FILE
    if not path.exists():
        there = sorted(p.parent.name for p in (cache / "runs").glob(f"*/{RUN_FILE}"))
        raise ValueError(f"no run {name} in {cache}/runs; there are: {', '.join(there) or 'none'}")
    return RunConfig.model_validate(artifacts.read_json(path)).replace(cache_dir=cache)


def unlike_others(run: RunConfig) -> str:
    """Why no other run of the cache is what the settled `run` will be."""

    def read(folder: Path) -> Fields:
        return _compared(artifacts.read_json(folder / RUN_FILE))

    others = reuse.existing(run.run_dir.parent, read, but=run.run_dir)
    return reuse.nearest(_compared(run.model_dump(mode="json")), others)


def size_of(asked: RunConfig) -> str:
    """Name of the model's size, which is that of the run of this name if there is one."""
    return (_recorded(asked) or asked).model.name


def _known(value: T | None) -> T:
    assert value is not None, "settle() fills this"
    return value


def _recorded(asked: RunConfig) -> RunConfig | None:
    if asked.run_name is None or not (asked.run_dir / RUN_FILE).exists():
        return None
    return load(asked.cache_dir, asked.run_name)


def _given(config: BaseModel) -> dict[str, Any]:
    """Settings that were set by hand and to something definite, nested."""
    given: dict[str, Any] = {}
    for name in config.model_fields_set:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            value = _given(value)
        if value not in (None, "auto", (), {}):
            given[name] = str(value) if isinstance(value, Path) else value
    return given


def _compared(settings: Fields) -> Fields:
    """Settings as in run.json, by which runs differ."""
    named = {"run_name", *_FREE}
    return {name: value for name, value in reuse.flat(settings).items() if name not in named}


def _without(given: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What is `given` and was not, with that value, before."""
    new = {}
    for name, value in given.items():
        known = before.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            value = _without(value, known)
        if value != {} and value != (tuple(known) if isinstance(known, list) else known):
            new[name] = value
    return new


def _over(recorded: RunConfig, asked: RunConfig) -> RunConfig:
    """The recorded settings with those on top that are given now.

    What was settled otherwise at the start, and is asked for again, stays as it was settled.
    """
    path = recorded.run_dir / ASKED_FILE
    before = artifacts.read_json(path) if path.exists() else {}
    base, given = recorded.model_dump(), _without(_given(asked), before)
    training = given.get("training", {})
    gpus = recorded.training.gpus or 1
    split = {"batch_size", "grad_accum_steps"} & set(training)
    if split or training.get("gpus", gpus) != gpus:
        base["training"] |= {"batch_size": None, "grad_accum_steps": None}
    if training.get("gpus") == 1:
        base["training"]["zero_stage"] = None
    if "size" in given.get("model", {}) or "hidden_size" in given.get("model", {}):
        base["model"] = {}
    for name, value in given.items():
        base[name] = base[name] | value if isinstance(value, dict) else value
    base["skip_preflight"] = asked.skip_preflight  # of a command, not of a run
    return RunConfig.model_validate(base)


def _difference(recorded: RunConfig, run: RunConfig) -> str:
    """The first setting in which a run may not change, and how it would; else nothing."""
    before, now = dict(leaves(recorded)), dict(leaves(run))
    for name in before:
        if name in _FREE or before[name] == now[name]:
            continue
        if name == "training.max_steps" and now[name] > before[name]:
            continue  # more steps extend a run
        return f"{name} {before[name]}, now it is {now[name]}"
    return ""


# Settings that one kind of data or tokenizer reads, and none of the others
_READ_BY_DATA = {
    "fineweb_subset": ("auto", "fineweb"),
    "text_column": ("auto", "fineweb", "hub", "files"),
    "bad_lines_limit": ("hub", "files"),
    "deduplicate": ("auto", "fineweb", "hub", "files", "sample"),
    "allow_synthetic_fallback": ("auto", "fineweb"),
}


def _refuse_what_does_nothing(asked: RunConfig) -> None:
    data, tokenizer = asked.data, asked.tokenizer
    for name, modes in _READ_BY_DATA.items():
        default = CorpusConfig.model_fields[name].default
        if data.data_mode not in modes and getattr(data, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')} does nothing with --data-mode {data.data_mode}, only "
                f"with {', '.join(modes)}: drop one of them"
            )
    trained = tokenizer.tokenizer_name in ("auto", tokenizers.TRAIN, tokenizers.SYNTHETIC)
    if not trained and tokenizer.vocab_size != TokenizerConfig.model_fields["vocab_size"].default:
        raise ValueError(
            f"--vocab-size does nothing with --tokenizer-name {tokenizer.tokenizer_name}, which "
            "has its own: drop it, or use --tokenizer-name train"
        )
    if tokenizer.end_of_text and tokenizer.tokenizer_name == tokenizers.TRAIN:
        raise ValueError(
            "--end-of-text does nothing with --tokenizer-name train, which has its own: drop it"
        )


def _refuse_what_the_device_cannot(run: RunConfig, device: Device) -> None:
    choice = run.training
    if choice.fp8:
        planning.require_fp8(
            device, run.model.shape, seq_len=choice.seq_len, precision=choice.precision
        )
    if choice.zero_stage and (choice.gpus or 1) == 1:
        raise ValueError(
            f"--zero-stage {choice.zero_stage} shares out among several GPUs, and there is one: "
            "add --gpus, or drop it"
        )


def _default_name(run: RunConfig) -> str:
    named = {"run_name", *_FREE}
    identity = {name: str(value) for name, value in leaves(run) if name not in named}
    gpus, stage = run.training.gpus, run.training.zero_stage
    shared = f"-{gpus}gpus-zero{stage}" if gpus and gpus > 1 else ""
    return f"{run.model.name}-{run.data.name}-{artifacts.fingerprint(identity)[:6]}{shared}"


_PEAK_LEARNING_RATES = {"tiny": 3e-3, "small": 2e-3, "medium": 1e-3}
_GPU_BATCH_TOKENS = {"tiny": 2**18, "small": 2**19, "medium": 2**20}
_CPU_BATCH_TOKENS = 512
_CPU_STEPS = 200


def _fill(
    choice: TrainingChoice, model: ModelChoice, data: CorpusConfig, device: Device
) -> TrainingChoice:
    """Defaults for what is None."""
    gpu, shape = device.kind == "cuda", model.shape
    nominal = with_vocabulary(shape, planning.NOMINAL_VOCABULARY)
    size = _nearest_size(nominal.parameters)
    seq_len = choice.seq_len or (2048 if gpu else 256)
    precision: Precision = choice.precision or ("bf16" if device.has_bf16 else "fp32")
    gpus, stage = choice.gpus or 1, choice.zero_stage or 0
    fits, checkpointing = planning.micro_batch(
        *(nominal, seq_len, device, choice.activation_checkpointing),
        precision=precision,
        fp8=choice.fp8,
        compiled=choice.compile,
        document_mask=choice.document_mask,
        stage=stage,
        ranks=gpus,
    )
    usual_tokens = _GPU_BATCH_TOKENS[size] if gpu else _CPU_BATCH_TOKENS
    batch_size, accumulate = _batch(choice, seq_len, fits, usual_tokens, gpus)
    batch_tokens = batch_size * accumulate * gpus * seq_len
    budget = planning.TOKENS_PER_PARAMETER * nominal.parameters
    steps = choice.max_steps or (-(-budget // batch_tokens) if gpu else _CPU_STEPS)
    # tiny on the sample at 512 tokens a step: 7.65 after 200 steps at 3e-3, 7.14 at 1e-3
    peak = _PEAK_LEARNING_RATES[size] / (1 if gpu else 3)
    warmup = max(round(0.02 * steps), min(10, steps // 10))
    prompt = "def " if data.data_mode == "sample" else "The "
    filled = {
        "gpus": gpus,
        "zero_stage": stage,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "grad_accum_steps": accumulate,
        "batch_tokens": batch_tokens,
        "max_steps": steps,
        "learning_rate": choice.learning_rate or peak,
        "warmup_steps": warmup if choice.warmup_steps is None else choice.warmup_steps,
        "precision": precision,
        "compile": device.compiles if choice.compile is None else choice.compile,
        "activation_checkpointing": checkpointing,
        "validation_tokens": choice.validation_tokens or (2**20 if gpu else 2**13),
        "validate_every": choice.validate_every or (250 if gpu else max(1, steps // 2)),
        "checkpoint_every": choice.checkpoint_every or max(1, min(250, steps // 5)),
        "log_interval": choice.log_interval or (10 if gpu else 5),
        "sample_prompt": prompt if choice.sample_prompt is None else choice.sample_prompt,
    }
    return choice.replace(**filled)


def _batch(
    choice: TrainingChoice, seq_len: int, fits: int, usual_tokens: int, gpus: int
) -> tuple[int, int]:
    """Rows in a micro-batch and micro-batches in a step, of each GPU."""
    rows, accumulate = choice.batch_size, choice.grad_accum_steps
    if choice.batch_tokens is None:
        wanted = max(1, round(usual_tokens / seq_len / gpus))
        if rows and accumulate:
            return rows, accumulate
        if rows:
            return rows, max(1, round(wanted / rows))
        if accumulate:
            return max(1, min(fits, round(wanted / accumulate))), accumulate
        rows = largest_divisor(wanted, fits)
        if 4 * rows >= fits:
            return rows, wanted // rows
        accumulate = -(-wanted // fits)  # 683 rows have no divisor: 38 x 18 keep the GPU busy
        return round(wanted / accumulate), accumulate
    wanted, rest = divmod(choice.batch_tokens, seq_len)
    if rest:
        raise ValueError(
            f"batch_tokens {choice.batch_tokens} is no multiple of seq_len {seq_len}: "
            f"take {max(1, wanted) * seq_len}"
        )
    wanted, rest = divmod(wanted, gpus)
    if rest:
        raise ValueError(
            f"{gpus} GPUs cannot share the {wanted * gpus + rest} rows of a step evenly: take "
            f"batch_tokens {max(1, wanted) * gpus * seq_len}, or another number of GPUs"
        )
    if rows is None:
        share, rest = divmod(wanted, accumulate or 1)
        rows = share if accumulate else largest_divisor(wanted, fits)
    accumulate = accumulate or wanted // rows
    if rest or rows * accumulate != wanted:
        raise ValueError(
            f"batch_tokens {choice.batch_tokens} are {wanted} rows of {seq_len}"
            f"{f' for each of {gpus} GPUs' if gpus > 1 else ''}, which is not "
            f"batch_size {rows} x grad_accum_steps {max(1, accumulate)}: drop one of the three"
        )
    return rows, accumulate


def _nearest_size(parameters: int) -> str:
    """The named size whose habits suit a model of this many parameters."""
    return "tiny" if parameters < 120e6 else "small" if parameters < 650e6 else "medium"


def _description(run: RunConfig, model: ModelConfig) -> str:
    """Of the run, on its page in MLflow."""
    choice = run.training
    return (
        f"{run.model.name}, {planning.parameter_count(model.parameters)} parameters, "
        f"on {run.data.name}: {choice.max_steps:,} steps of {choice.batch_tokens:,} tokens "
        f"at a peak learning rate of {choice.learning_rate:g}, seed {run.seed}"
    )


def _group_tags(run: RunConfig) -> dict[str, str]:
    """That put the run into its sweep."""
    if run.sweep is None:
        return {}
    group = tracking.run_facts(run.cache_dir / "sweeps" / run.sweep)
    return {"sweep": run.sweep} | ({tracking.PARENT: group["run_id"]} if group else {})


def training_job(
    settled: Settled,
    model: ModelConfig,
    rows: ShardSet,
    tokens: TokenizerFiles,
    *,
    tags: dict[str, str],
) -> TrainingJob:
    """What the training processes of a settled run are given.

    Args:
        tags: of the MLflow run, beside those that follow from the settings.
    """
    run = settled.run
    uri, folder = tracking.location(run.cache_dir)
    tracked = TrackingConfig(
        uri=uri,
        folder=folder,
        run_name=_known(run.run_name),
        tags={
            "size": run.model.name,
            "source": run.data.name,
            "tokenizer": tokens.name,
            "device": settled.device.name,
            "gpus": str(run.training.gpus),
            "zero_stage": str(run.training.zero_stage),
            "parameters": str(model.parameters),
            "max_steps": str(run.training.max_steps),
            "synthetic_fallback": str(run.fell_back).lower(),
            tracking.DESCRIPTION: _description(run, model),
            **_group_tags(run),
            **tags,
        },
        params={name: str(value) for name, value in leaves(run)},
        dataset={
            "name": run.data.name,
            "digest": rows.path.name.rsplit("-", 1)[-1],
            "source": f"{run.data.name}@{run.data.data_revision or run.seed}",
        },
    )
    bf16, peak = run.training.precision == "bf16", settled.device.peak_flops
    return TrainingJob(
        run_dir=run.run_dir,
        model=model,
        training=settled.training,
        cadence=run.cadence,
        retention=run.retention,
        hang_seconds=run.training.hang_seconds,
        roll_back_spikes=run.training.on_spike == "roll-back",
        shards=rows,
        validation_rows=run.validation_rows,
        tokenizer=tokens,
        prompt=run.training.sample_prompt or "",
        sampling=run.sampling,
        tracking=tracked,
        compile_cache=run.cache_dir.resolve() / "compile",
        peak_flops=settled.training.ranks * peak if bf16 and peak else None,
    )


def resume_promise(run: RunConfig) -> str:
    """How exact this run is when it goes on."""
    if run.training.gpus and run.training.gpus > 1:
        return _promise_of_one(run) + "; on another number of GPUs sums are of another order"
    return _promise_of_one(run)


def _promise_of_one(run: RunConfig) -> str:
    if run.device == "cpu":
        return "bit for bit"
    if run.training.deterministic:
        return "bit for bit, with deterministic kernels only"
    return (
        "the same data, random numbers and weights; kernels differ in the last bits between runs "
        "(--deterministic: they do not, for 3-10 % of the speed)"
    )
