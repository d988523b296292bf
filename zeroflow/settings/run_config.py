"""Requested settings of a run.

The command line, the Prefect form, MLflow's params and `run.json` are generated from `RunConfig`. A
setting that is None depends on the device or on the outside world. `settle` decides it and returns
another type, `settled.Settled`, in which every setting has a value.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from zeroflow.checks.overfit import OverfitConfig
from zeroflow.config import (
    IN_64_BITS,
    NAME,
    Config,
    FiniteNonNegative,
    FinitePositive,
    WholeNonNegative,
    WholePositive,
    flag,
)
from zeroflow.data.corpus import CorpusConfig, absolute
from zeroflow.data.packing import PackingName
from zeroflow.data.tokenizer import SYNTHETIC_TOKENIZER, TokenizerConfig
from zeroflow.device import Device, Precision
from zeroflow.model.llama import ActivationCheckpointing, ModelConfig, Shape
from zeroflow.model.sizes import SIZES, SizeName, by_size
from zeroflow.reuse import Fields
from zeroflow.run_folder import DEFAULT_CACHE, Cache, RunFolder
from zeroflow.settings.flags import refused
from zeroflow.tracking.config import TrackerName
from zeroflow.training import initial
from zeroflow.training.optimizers.choice import DEFAULT, AnyOptimizer
from zeroflow.training.schedule import ScheduleName, decays
from zeroflow.training.workload import SETTING_NAMES, Workload
from zeroflow.training.zero import Offload, Stage
from zeroflow.units import parameter_count

T = TypeVar("T")


class ModelChoice(Config):
    """Network: a named size, a complete custom shape, or a trained model."""

    size: SizeName | None = Field(
        None,
        description="Parameters with Llama-3.1's vocabulary: "
        f"{by_size(lambda size: parameter_count(size.nominal_parameters))}. Default: tiny.",
    )

    init_from: str | None = Field(None, min_length=1)
    """Start from the weights, the shape and the tokenizer of a trained model: run:NAME or
    run:NAME@STEP for a checkpoint of a run in the same cache (run:NAME@best for the one with the
    lowest validation loss), a folder in the format of Hugging Face, or a name on its Hub, with an
    optional @REVISION. Default: random weights."""

    hidden_size: WholePositive | None = None
    """Features per token. For a custom shape."""

    num_hidden_layers: WholePositive | None = None
    """Decoder blocks. For a custom shape."""

    num_attention_heads: WholePositive | None = None
    """Query heads. For a custom shape."""

    num_key_value_heads: WholePositive | None = None
    """Key/value heads. For a custom shape."""

    intermediate_size: WholePositive | None = None
    """Features inside the feed-forward network. For a custom shape."""

    @model_validator(mode="after")
    def _size_or_shape(self) -> Self:
        given = {name: getattr(self, name) for name in Shape.model_fields}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) < len(given):
            if self.size is not None:
                raise ValueError(
                    f"--size {self.size} and a custom shape exclude each other: drop one of them"
                )
            if missing:
                raise ValueError(f"a custom shape also needs {', '.join(map(flag, missing))}")
            Shape(**given)
        if self.size is not None and self.init_from is not None:
            raise ValueError(
                f"--size {self.size} and --init-from {self.init_from}, which has its own shape, "
                "exclude each other: drop one of them"
            )
        return self

    @property
    def settled(self) -> Self:
        """Return the same choice with the default size filled in."""
        open_ = self.size is None and self.hidden_size is None and self.init_from is None
        return self.replace(size="tiny") if open_ else self

    @property
    def anywhere(self) -> Self:
        """The same choice, with an absolute path if it names a folder."""
        if self.init_from is None:
            return self
        return self.model_copy(update={"init_from": initial.anywhere(self.init_from)})

    @property
    def shape(self) -> Shape:
        """The shape; that of tiny for an initial model that is not looked up yet."""
        if self.hidden_size is None:
            return SIZES[self.size or "tiny"]
        return Shape(**{name: getattr(self, name) for name in Shape.model_fields})

    @property
    def name(self) -> str:
        return "custom" if self.hidden_size or self.init_from else self.size or "tiny"


class TrainingChoice(Config):
    """Training. Defaults depend on the device and the size, and are logged."""

    free: ClassVar[tuple[str, ...]] = (
        "batch_size",  # with grad_accum_steps and gpus: only their product affects the mathematics
        "grad_accum_steps",
        "gpus",
        "nodes",
        "zero_stage",
        "shard_group",
        "reshard_group",
        "offload",
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
    """Settings that may change when a run is resumed, because they do not affect the weights."""

    gpus: WholePositive | None = None
    """Number of GPUs of each machine to train on; with device cpu, number of processes that share
    its cores. Default: 1."""

    nodes: WholePositive = 1
    """Number of machines to train on. Each has the same number of GPUs, and all share the cache
    folder. The log has the command that starts the ranks on each machine; see the guide to several
    machines."""

    zero_stage: Stage | None = None
    """ZeRO stage: what is sharded across GPUs. 0: nothing. 1: optimiser state and weights. 2: also
    gradients. 3: weights also while they are in use. Default: 0; 2 with --offload."""

    shard_group: Annotated[int, Field(ge=2), IN_64_BITS] | None = None
    """Number of GPUs over which the state is sharded at ZeRO stages 1 to 3, such as the GPUs of one
    machine. The groups are replicas of each other. Default: all GPUs."""

    reshard_group: Annotated[int, Field(ge=2), IN_64_BITS] | None = None
    """Number of GPUs over which the weights of a block stay sharded between the forward and the
    backward pass at ZeRO stage 3, such as the GPUs of one machine. The backward pass then gathers
    weights within such a group only, which takes more memory. Default: all GPUs of a shard
    group."""

    offload: Offload = "none"
    """State to keep in host memory, on one GPU or several. optimizer: the fp32 weights, the sums of
    gradients and the moments, which the CPU updates. The GPU has weights in the precision of the
    matrix multiplications. This saves up to 16 bytes per parameter and makes steps slower."""

    seq_len: Annotated[int, Field(ge=2), IN_64_BITS] | None = None
    """Tokens of context. Default: 256 on a CPU, 2048 on a GPU."""

    batch_size: WholePositive | None = None
    """Rows in a micro-batch on each GPU. Default: as many as fit in its memory."""

    grad_accum_steps: WholePositive | None = None
    """Micro-batches in a step on each GPU. Default: --batch-tokens / (--batch-size x --seq-len x
    gpus)."""

    batch_tokens: WholePositive | None = Field(
        None,
        description="Tokens in a step. Default: 512 on a CPU; on a GPU "
        f"{by_size(lambda size: f'{size.batch_tokens / 2**20:g}M')}.",
    )

    max_steps: WholePositive | None = None
    """Optimiser steps. Default: 200 on a CPU, which takes some minutes for tiny; 20 tokens per
    parameter on a GPU."""

    learning_rate: FinitePositive | None = Field(
        None,
        description="Peak learning rate. Default: "
        f"{by_size(lambda size: f'{size.learning_rate:g}')}; a third of that on a CPU, where "
        "batches are small; a tenth with --init-from.",
    )

    warmup_steps: WholeNonNegative | None = None
    """Steps of linear warm-up. Default: 2 % of --max-steps; 10 % of a short run."""

    schedule: ScheduleName = Field("cosine", description=decays())

    precision: Precision | None = None
    """Precision of matrix multiplications and activations; bf16 keeps fp32 master weights. Default:
    bf16 on a GPU, fp32 on a CPU."""

    fp8: bool = False
    """Compute the matrix products of the decoder blocks and of the loss in fp8, on Ada, Hopper and
    newer GPUs. On H200s, medium became about 35 % faster and small 25 %."""

    compile: bool | None = None
    """Compile the decoder blocks with torch.compile. Default: yes on a GPU."""

    document_mask: bool = False
    """Restrict attention to the token's own document, and restart positions with each document."""

    z_loss: FiniteNonNegative = 0.0
    """Weight of the squared log of the softmax's denominator in the loss, which keeps logits from
    drifting; 1e-5 is a common value. Validation losses do not include it."""

    validation_tokens: WholePositive | None = None
    """Held-out tokens per validation. Default: 8K on a CPU, 1M on a GPU."""

    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Fraction of the text that is held out for validation: whole documents, or the ends of long
    documents."""

    token_type: Literal["int32", "uint16"] = "int32"
    """Integer type of the shards; uint16 takes half the space, for vocabularies up to 65,536."""

    packing: PackingName = "best-fit"
    """Packing of documents into rows: best-fit cuts only documents that are longer than a row, and
    pads short rows; the loss ignores padding. concat joins documents end to end and cuts them
    wherever a row is full."""

    validate_every: WholePositive | None = None
    """Steps between validations. Default: half of the run on a CPU, 250 on a GPU."""

    checkpoint_every: WholePositive | None = None
    """Steps between checkpoints. One that is due while the one before is still being written is
    skipped. Default: a fifth of the run, at most 250."""

    keep_checkpoints: WholePositive = 2
    """Number of newest checkpoints to keep. The one with the lowest validation loss is always
    kept too."""

    keep_every: WholePositive | None = None
    """Also keep checkpoints at multiples of this many steps. Default: none."""

    deterministic: bool | None = None
    """Use only deterministic kernels, so that an interrupted run ends with the same bits. Default:
    yes on Hopper GPUs with zeroflow[hopper], if they have a deterministic kernel for the attention
    of the model, where it costs about 1 % of the speed; elsewhere no, as it costs 3-10 %. Kernels
    on a CPU are always deterministic."""

    activation_checkpointing: ActivationCheckpointing | None = None
    """Recompute activations in the backward pass, which saves memory and costs time: selective
    recomputes those within the feed-forward networks, full recomputes all. Default: the first of
    none, selective and full with which one row fits in memory."""

    on_spike: Literal["report", "roll-back"] = "report"
    """Reaction to an unusual loss, gradient norm or update: log a warning, or roll back to the
    newest checkpoint and skip the data since."""

    hang_seconds: WholePositive = 3600
    """Seconds without a finished step after which training is considered hung and is restarted."""

    log_interval: WholePositive | None = None
    """Steps between logged losses. Default: 5 on a CPU, 10 on a GPU."""

    sample_prompt: str | None = None
    """Prompt of the text sample at each validation. Default: a prompt that suits the data."""

    sample_tokens: WholePositive = 48
    """Length of the text sample in tokens."""

    @property
    def ranks(self) -> int:
        """Number of ranks on all machines."""
        return self.nodes * (self.gpus or 1)


class BuildChoice(Config):
    """Building of shards. These settings change the build time, but no byte of the result."""

    data_workers: WholePositive = 2
    """Number of parts to build at once. Two keep two cores busy; more help with more cores, or if
    reading is slow."""

    data_runner: Literal["threads", "dask"] = "threads"
    """Build parts in threads of this process, or on Dask workers."""

    dask_address: str | None = None
    """Address of the scheduler of a running Dask cluster, which must share the cache folder.
    Default: a cluster of --data-workers processes on this machine."""

    @model_validator(mode="after")
    def _address_belongs_to_dask(self) -> Self:
        if self.dask_address and self.data_runner != "dask":
            raise ValueError("--dask-address needs --data-runner dask: add it")
        return self


class HostsChoice(Config):
    """Machines of a run with --nodes. These settings do not change the result."""

    min_nodes: WholePositive | None = None
    """Minimum number of machines with which training continues if others fail. Each step still has
    the same rows. Default: all of --nodes."""

    local_cache: Path | None = None
    """Folder on a local disk of each machine for copies of the shards that its ranks read. Default:
    rows are read from the cache folder."""

    launcher: Literal["by-hand", "slurm", "kubernetes"] = "by-hand"
    """Method of starting the ranks of each machine: by-hand logs the command to run on each; slurm
    submits a job with sbatch, or a job array for the runs of a sweep; kubernetes creates a Job with
    kubectl."""

    sbatch_options: str = ""
    """Additional options for sbatch, such as "--partition=gpu --time=24:00:00"."""

    image: str | None = None
    """Container image with zeroflow, for --launcher kubernetes."""

    volume_claim: str | None = None
    """PersistentVolumeClaim with the cache folder, for --launcher kubernetes."""

    namespace: str = "default"
    """Namespace of the Job, for --launcher kubernetes."""

    @model_validator(mode="after")
    def _kubernetes_needs_an_image(self) -> Self:
        needed = {"--image": self.image, "--volume-claim": self.volume_claim}
        missing = [name for name, value in needed.items() if value is None]
        if self.launcher == "kubernetes" and missing:
            raise ValueError(f"--launcher kubernetes also needs {' and '.join(missing)}")
        return self


class EvaluationChoice(Config):
    """Evaluation of the trained model, as the last stage. These settings do not change the run."""

    evaluate_path: tuple[str, ...] = ()
    """Files or globs of text on which the trained model is scored, each by itself."""

    evaluate_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness on which the trained model is scored; default for those that
    suit small models. They need zeroflow[eval]."""

    evaluate_task_path: str | None = None
    """Folder with YAML files of your own tasks."""

    evaluate_core_path: Path | None = None
    """Folder `eval_bundle` with the data of CORE, on which the trained model is scored."""

    @property
    def is_asked_for(self) -> bool:
        return bool(self.evaluate_path or self.evaluate_tasks or self.evaluate_core_path)

    @property
    def anywhere(self) -> Self:
        """A copy with absolute paths."""
        tasks, core = self.evaluate_task_path, self.evaluate_core_path
        return self.model_copy(
            update={
                "evaluate_path": tuple(map(absolute, self.evaluate_path)),
                "evaluate_task_path": tasks and absolute(tasks),
                "evaluate_core_path": core and core.absolute(),
            }
        )


class RunConfig(Config):
    """All settings that define a run."""

    run_name: str | None = Field(None, pattern=NAME, max_length=100)
    """Name of the run. An existing run of this name is resumed. Default: made from the settings, so
    that the same command resumes the run."""

    sweep: str | None = Field(None, pattern=NAME, max_length=60)
    """Sweep that the run belongs to; MLflow groups the runs of a sweep."""

    cache_dir: Path = DEFAULT_CACHE
    """Folder for all output: tokenizers, shards, runs, mlflow."""

    log_to: tuple[Literal["tensorboard", "wandb", "none"], ...] = ()
    """Trackers that receive the metrics in addition to MLflow: TensorBoard, which needs
    zeroflow[tensorboard], and Weights & Biases, which needs zeroflow[wandb]. A run that is resumed
    keeps its trackers; none removes them."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto uses a GPU if there is one."""

    seed: WholeNonNegative = 0
    """Seed of the weights, the data order and synthetic data."""

    skip_preflight: bool = False
    """Train without the pre-flight checks."""

    register_: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Register the trained model in MLflow as a version of the model with this name, and also the
    checkpoint with the lowest validation loss if that is another. MLflow then stores a copy of the
    weights."""

    model: ModelChoice = ModelChoice()
    data: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    build: BuildChoice = BuildChoice()
    training: TrainingChoice = TrainingChoice()
    hosts: HostsChoice = HostsChoice()
    optimizer: AnyOptimizer = DEFAULT
    overfit: OverfitConfig = OverfitConfig()
    evaluation: EvaluationChoice = EvaluationChoice()

    if not TYPE_CHECKING:  # for a type checker, the parameters are the settings

        def __init__(self, **given: Any) -> None:
            """
            Raises:
                ValueError: a setting is wrong. pydantic's own message is not written for users.
            """
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise refused(type(self), error) from None

        # As in pydantic's own classes: `model_validate` does not call it
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.data.data_mode == "synthetic" and self.tokenizer.tokenizer_name not in (
            "auto",
            SYNTHETIC_TOKENIZER,
        ):
            raise ValueError(
                "synthetic data is token ids and needs no tokenizer: drop --tokenizer-name. "
                "--vocab-size sets the size of the vocabulary"
            )
        return self

    @model_validator(mode="after")
    def _logs_to_none_alone(self) -> Self:
        if "none" in self.log_to and self.trackers:
            raise ValueError(f"--log-to none contradicts {self.trackers[0]}: drop one of them")
        return self

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """Trackers besides MLflow."""
        return tuple(name for name in self.log_to if name != "none")

    @property
    def folder(self) -> RunFolder:
        assert self.run_name is not None, "settle() names the run"
        return Cache(self.cache_dir).run(self.run_name)

    @property
    def run_dir(self) -> Path:
        return self.folder.path

    @property
    def anywhere(self) -> Self:
        """Return the same settings with absolute paths."""
        changes: dict[str, object] = {"cache_dir": self.cache_dir.absolute()}
        if (data := self.data.anywhere) != self.data:
            changes["data"] = data
        if (model := self.model.anywhere) != self.model:
            changes["model"] = model
        if (evaluation := self.evaluation.anywhere) != self.evaluation:
            changes["evaluation"] = evaluation
        return self.model_copy(update=changes)

    def workload(self, model: ModelConfig, device: Device, **settled: Any) -> Workload:
        """Return the workload of a step that these settings define.

        Args:
            settled: values of workload fields that are None here, or that replace the value here.
        """
        given = {
            field: value
            for field, name in _OF_WORKLOAD.items()
            if (value := getattr(self.training, name)) is not None
        }
        given["ranks"] = self.training.ranks
        if self.training.offload != "none":
            given.setdefault("zero_stage", _OFFLOADED_STAGE)
        place = {"device": device.kind, "device_name": device.name}
        whole = {"model": model, "optimizer": self.optimizer, **place, **given, **settled}
        return Workload.model_validate(whole)


_OFFLOADED_STAGE = 2
"""Default stage of offloaded state, as in ZeRO-Offload: https://arxiv.org/abs/2101.06840"""

_OF_WORKLOAD = {
    field: setting
    for field in Workload.model_fields
    if (setting := SETTING_NAMES.get(field, field)) in TrainingChoice.model_fields
}
"""Training settings that determine the workload, by its fields."""


def of_workload(workload: Workload) -> Fields:
    """Return the training settings that give `workload`."""
    settings = {name: getattr(workload, field) for field, name in _OF_WORKLOAD.items()}
    return settings | {"gpus": workload.ranks // workload.nodes}


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting as ("group.name", value)."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
