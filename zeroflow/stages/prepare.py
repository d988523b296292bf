"""Stages between plan and training: tokenizer, shards and model."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from zeroflow.data import build as builds
from zeroflow.data import shared_build, statistics, tokenizer_origins
from zeroflow.data import tokenizer as tokenizers
from zeroflow.data.builders import Builders, BuildPart, in_threads
from zeroflow.data.on_dask import on_dask
from zeroflow.data.parts import build_part
from zeroflow.data.shards import ShardSet
from zeroflow.data.shared_build import Shared
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.device import known_gpu
from zeroflow.model import build as models
from zeroflow.model.llama import ModelConfig
from zeroflow.report import data_page
from zeroflow.report.pages import never_fatal
from zeroflow.settings.run_config import BuildChoice, RunConfig
from zeroflow.settings.settle import look_up
from zeroflow.settings.settled import Settled, Settlement
from zeroflow.stages.view import LOG_ONLY, View
from zeroflow.training import checkpoint, initial
from zeroflow.training.job import TrainingJob, trained_tokenizer

log = logging.getLogger(__name__)


def fetch_tokenizer(run: Settled) -> Tokenizer:
    """Ensure that the run's tokenizer is in the cache; a trained run keeps its copy.

    Raises:
        ValueError, hub.HubError: there is no such tokenizer.
    """
    trained = trained_tokenizer(run.folder)
    if trained and (copy := tokenizers.own_copy(trained)):
        if changed := tokenizers.changed_since(run.tokenizer, copy):
            name = run.tokenizer.tokenizer_name
            log.warning("%s has changed (%s): the run uses its own copy", name, changed)
        log.info("tokenizer reused: %s", copy.path)
        return copy
    return tokenizer_origins.fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)


def build_shards(run: Settled, tokenizer: Tokenizer, view: View = LOG_ONLY) -> ShardSet:
    """Build the shards that the run needs."""
    with part_builders(run.build, view) as builders:
        return builds.build_shards(
            run.shard_config,
            run.data,
            tokenizer,
            run.cache_dir,
            seed=run.seed,
            builders=builders,
            show=view.progress("shards"),
        )


def build_together(asked: RunConfig, *, gpu: str | None = None) -> Shared:
    """Build the shards of a run together with other processes that use the same settings.

    The run itself is not recorded.

    Args:
        gpu: name of the GPU that the run will use; None for the device of this machine.

    Raises:
        ValueError, hub.HubError: the settings or the input cannot be used.
    """
    run = look_up(asked, known_gpu(gpu) if gpu else None).run
    tokenizer = tokenizer_origins.fetch_tokenizer(run.tokenizer, run.data, run.cache_dir)
    planner = builds.planned(run.shard_config, run.data, tokenizer, run.cache_dir, seed=run.seed)
    with part_builders(run.build, LOG_ONLY) as builders:
        return shared_build.build_together(planner, run.shard_config, builders)


@contextmanager
def part_builders(choice: BuildChoice, view: View) -> Iterator[Builders]:
    """Yield threads that build parts, or that wait while Dask workers build them."""
    with ExitStack() as stack:
        build: BuildPart = build_part
        if choice.data_runner == "dask":
            build = stack.enter_context(on_dask(choice.data_workers, choice.dask_address))
        yield stack.enter_context(in_threads(choice.data_workers, view.part_builder(build)))


def build_model(run: Settled, tokenizer: Tokenizer) -> ModelConfig:
    """Return the configuration of the network.

    The weights that the run starts from are copied first, unless it has a checkpoint.

    Raises:
        ValueError, hub.HubError: the model of --init-from cannot be used.
    """
    config = run.network(tokenizer.vocab_size)
    source = run.model.init_from
    if run.initial and source and not checkpoint.newest_step(run.folder.checkpoints):
        initial.fetch(source, run.initial, run.cache_dir)
    return models.build_model(config, run.folder)


class Prepared(NamedTuple):
    """A run that is ready for training."""

    settlement: Settlement
    tokenizer: Tokenizer
    shards: ShardSet
    job: TrainingJob


def show_data(prepared: Prepared, view: View = LOG_ONLY) -> None:
    """Write and show the page about the data of a run."""
    settlement, tokenizer, shards, _ = prepared
    with never_fatal("page of the data"):
        gathered = statistics.gather(shards, tokenizer)
        page = data_page.write_data(shards, gathered, tokenizer, settlement.run.folder)
        view.page(page, "data")
