"""The training job of a settled run."""

from pathlib import Path

from zeroflow.data.shards import ShardSet
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import ModelConfig
from zeroflow.run_folder import Cache
from zeroflow.settings.run_config import leaves
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.settings.versions import git_commit, versions
from zeroflow.text.markup import escaped
from zeroflow.tracking.config import (
    COMMIT,
    DESCRIPTION,
    PARENT,
    SOURCE,
    TrackingConfig,
    location,
)
from zeroflow.tracking.store import run_ids
from zeroflow.training import initial
from zeroflow.training.extension import extended, extensions
from zeroflow.training.job import TrainingJob
from zeroflow.units import count, parameter_count


def _description(run: Settled, model: ModelConfig) -> str:
    """Return the description of the run, which MLflow shows as Markdown."""
    choice = run.training
    steps = count(choice.max_steps, "step")
    start = f", from {escaped(source)}" if (source := run.model.init_from) else ""
    return (
        f"{run.model.name}, {parameter_count(model.parameters)} parameters{start}, on "
        f"{escaped(run.data.name)}: {steps} of {choice.batch_tokens:,} tokens "
        f"at a peak learning rate of {choice.learning_rate:g}, seed {run.seed}"
    )


def _version_tags() -> dict[str, str]:
    """Return MLflow tags about the code that trains."""
    tags = {f"version.{name}": number for name, number in versions().items()}
    if commit := git_commit():
        # MLflow makes a link of COMMIT, which must not contain "+changes"
        tags |= {"git_commit": commit, SOURCE: "zeroflow", COMMIT: commit.partition("+")[0]}
    return tags


def _shape(model: ModelConfig) -> dict[str, str]:
    """Return the numbers of the model as MLflow params; the settings may have only its size."""
    numbers = model.model_dump() | {"parameters": model.parameters}
    return {f"model.{name}": str(number) for name, number in numbers.items()}


def _group_tags(run: Settled) -> dict[str, str]:
    """Return the MLflow tags that make the run a child of its sweep."""
    if run.sweep is None:
        return {}
    group = run_ids(Cache(run.cache_dir).sweep(run.sweep))
    return {"sweep": run.sweep} | ({PARENT: group.run_id} if group else {})


def initial_weights(run: Settled) -> Path | None:
    """Return the folder of the weights that the run starts from; None for random weights."""
    if run.initial is None or run.model.init_from is None:
        return None
    return initial.directory(run.model.init_from, run.initial, run.cache_dir)


def training_job(
    settled: Settlement,
    model: ModelConfig,
    shards: ShardSet,
    tokenizer: Tokenizer,
    *,
    tags: dict[str, str],
) -> TrainingJob:
    """Return the job that the ranks of a settled run receive.

    Args:
        tags: additional tags of the MLflow run.
    """
    run = settled.run
    training = run.training_config(model, settled.device)
    bf16, peak = run.training.precision == "bf16", settled.device.peak_flops
    job = TrainingJob(
        run_dir=run.run_dir,
        training=training,
        cadence=run.cadence,
        retention=run.retention,
        min_nodes=run.hosts.min_nodes,
        local_cache=run.hosts.local_cache and run.hosts.local_cache.absolute(),
        hang_seconds=run.training.hang_seconds,
        roll_back_spikes=run.training.on_spike == "roll-back",
        shards=shards,
        validation_rows=run.validation_rows,
        tokenizer=tokenizer,
        initial=initial_weights(run),
        prompt=run.training.sample_prompt,
        sampling=run.sampling,
        tracking=_tracking(settled, model, shards, tokenizer, tags),
        compile_cache=Cache(run.cache_dir.resolve()).compiled,
        peak_flops=training.workload.ranks * peak if bf16 and peak else None,
    )
    return _with_extensions(extended(job))


def _with_extensions(job: TrainingJob) -> TrainingJob:
    """Return the job with its extensions in the description of the run."""
    found = "; ".join(map(str, extensions(job.training.schedule)))
    if not found:
        return job
    tags = job.tracking.tags | {DESCRIPTION: f"{job.tracking.tags[DESCRIPTION]}; {found}"}
    return job.replace(tracking=job.tracking.replace(tags=tags))


def _tracking(
    settled: Settlement,
    model: ModelConfig,
    shards: ShardSet,
    tokenizer: Tokenizer,
    tags: dict[str, str],
) -> TrackingConfig:
    """Return what the trackers show of a run besides its metrics."""
    run = settled.run
    params = {name: str(value) for name, value in leaves(run)} | _shape(model)
    all_tags = {
        **run.tags,
        "tokenizer": tokenizer.name,
        "device": settled.device.name,
        "parameters": str(model.parameters),
        **_version_tags(),
        DESCRIPTION: _description(run, model),
        **_group_tags(run),
        **tags,
    }
    dataset = {
        "name": run.data.name,
        "digest": shards.path.name.rsplit("-", 1)[-1],
        "source": f"{run.data.name}@{run.data.data_revision or run.seed}",
    }
    uri, folder = location(run.cache_dir)
    return TrackingConfig(
        uri=uri,
        folder=folder,
        run_name=run.run_name,
        tags=all_tags,
        params=params,
        dataset=dataset,
        log_to=run.trackers,
    )
