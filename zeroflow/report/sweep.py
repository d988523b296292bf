"""Stages of a sweep besides its runs: check, record, compare."""

from typing import Any

from zeroflow import artifacts
from zeroflow.report import comparison, pictures
from zeroflow.report.pages import Page
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import started_otherwise
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.tracking import tracker
from zeroflow.tracking.config import DESCRIPTION, TrackingConfig, location


def finished(cell: RunConfig) -> bool:
    """True if the run has completed, according to its report."""
    return comparison.outcome(cell.cache_dir, str(cell.run_name)) is not None


def require_as_started(sweep: SweepConfig) -> None:
    """
    Raises:
        ValueError: a run of the sweep was already trained with other settings.
    """
    for cell in cells(sweep):
        if different := started_otherwise(cell):
            raise ValueError(
                f"run {cell.run_name} of sweep {sweep.name} was started with {different}: use "
                "another --sweep-name, or the earlier setting"
            )


def open_group(sweep: SweepConfig) -> None:
    """Record the sweep, and open the MLflow run that is the parent of the sweep's runs."""
    uri, local = location(sweep.run.cache_dir)
    artifacts.write_json(sweep.folder.settings, sweep.model_dump(mode="json"))
    axes = ("sizes", "seeds", "learning_rates", "zero_stages")
    varied = {name: getattr(sweep, name) for name in axes}
    config = TrackingConfig(
        uri=uri,
        folder=local,
        run_name=sweep.name,
        tags={"sweep": sweep.name, DESCRIPTION: f"Sweep of {len(cells(sweep))} runs"},
        params={name: " ".join(map(str, values)) for name, values in varied.items()},
        dataset=None,
    )
    tracker.open_group(config, sweep.folder)


def compare(sweep: SweepConfig, *, failed: list[str]) -> Page:
    """Write comparison.md and comparison.json about the sweep's finished runs, also to MLflow.

    Runs that an earlier command trained are included.

    Raises:
        ValueError: no run has finished.
    """
    cache, where = sweep.run.cache_dir, sweep.folder
    outcomes = [one for name in _members(sweep) if (one := comparison.outcome(cache, name))]
    if not outcomes:
        raise ValueError(f"no run of sweep {sweep.name} has finished: {', '.join(failed)}")
    found = comparison.compare(outcomes)
    drawn = pictures.losses_compared(found, where)
    page = comparison.page(sweep.name, found, pictures=drawn, failed=failed)
    page.write(where.comparison_page)
    found.write(where.comparison)
    law = {"sweep/exponent": found.law.b} if found.law else {}
    best = min(one.val_loss for one in outcomes)
    tracker.close_group(
        where,
        [where.comparison_page, where.comparison, *drawn],
        {"sweep/val_best": best} | law,
        failed=bool(failed),
    )
    return page


def _members(sweep: SweepConfig) -> list[str]:
    """Names of all runs of the sweep, including those of earlier commands."""
    asked = [str(cell.run_name) for cell in cells(sweep)]
    there = Cache(sweep.run.cache_dir).existing_runs()
    earlier = [folder.name for folder in there if _sweep_of(folder) == sweep.name]
    return list(dict.fromkeys(asked + earlier))


def _sweep_of(folder: RunFolder) -> Any:
    try:
        return artifacts.read_json(folder.settings)["sweep"]
    except (OSError, ValueError, LookupError):  # damaged, or written by another version
        return None
