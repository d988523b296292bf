"""Public functions: run the pipeline without Prefect, and load its results."""

from pathlib import Path

from zeroflow import pipeline
from zeroflow.inference import trained
from zeroflow.inference.trained import Trained
from zeroflow.report.records import RunReport
from zeroflow.run_folder import DEFAULT_CACHE
from zeroflow.settings.run_config import RunConfig
from zeroflow.training.checkpoint import Which


def pretrain(run: RunConfig = RunConfig()) -> RunReport:  # noqa: B008, it is frozen
    """Run the whole pipeline, from raw text to a trained and checked model with a report.

    A run of the same name is resumed; a finished one returns immediately. Progress is logged to the
    logger `zeroflow`; `logging.basicConfig(level="INFO")` shows it.

    Returns:
        The run's report, as in its report.json.

    Raises:
        ValueError, HubError: the settings or the input cannot be used.
        RunIsBusy: another process is working on the run.
        PreflightFailed, TrainingFailed, OverfitFailed: the stage failed; finished work is kept.
        TrainingStopped: training was stopped from outside after writing a checkpoint.
    """
    if not isinstance(run, RunConfig):
        raise ValueError(f"settings are a RunConfig, not {run!r}: use pretrain(RunConfig(...))")
    return RunReport.read(pipeline.pretrain(run))


def load(name: str, cache_dir: Path | str = DEFAULT_CACHE, *, step: Which = "newest") -> Trained:
    """Load a checkpoint of run `name`, with its tokenizer and shards.

    Args:
        step: step of the checkpoint, "newest", or "best": the lowest validation loss.

    Raises:
        ValueError: `cache_dir` has no such run, or the run has no such checkpoint; the message
            lists those that exist.
    """
    return trained.load(Path(cache_dir), name, step)
