"""The steps of a sweep apart from its runs: check, record, compare."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from zeroflow import artifacts
from zeroflow.report import comparison, comparison_page, plots
from zeroflow.report.comparison import Comparison
from zeroflow.report.outcome import Status, failures, outcome
from zeroflow.report.page_text import as_html
from zeroflow.report.pages import Page, never_fatal
from zeroflow.run_folder import Cache, RunFolder
from zeroflow.settings.existing import started_otherwise
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.tracking import tracker
from zeroflow.tracking.config import DESCRIPTION, TrackingConfig, location
from zeroflow.units import count

log = logging.getLogger(__name__)


def finished(cell: RunConfig) -> bool:
    """Return True if the run has completed, according to its report."""
    found = outcome(cell.cache_dir, str(cell.run_name))
    return found is not None and found.status == "completed"


def require_as_started(sweep: SweepConfig) -> None:
    """
    Raises:
        ValueError: a run of the sweep was already trained with other settings.
    """
    for cell in cells(sweep):
        if different := started_otherwise(cell):
            raise ValueError(
                f"run {cell.run_name} of sweep {sweep.name} was trained with {different}: use "
                "another --sweep-name, or the earlier setting"
            )


def open_group(sweep: SweepConfig) -> None:
    """Record the sweep, and open the MLflow run that is the parent of the sweep's runs."""
    uri, local = location(sweep.run.cache_dir)
    artifacts.write_json(sweep.folder.settings, sweep.model_dump(mode="json"), private=True)
    axes = ("sizes", "seeds", "learning_rates", "zero_stages")
    varied = {name: getattr(sweep, name) for name in axes}
    config = TrackingConfig(
        uri=uri,
        folder=local,
        run_name=sweep.name,
        tags={"sweep": sweep.name, DESCRIPTION: f"Sweep of {count(len(cells(sweep)), 'run')}"},
        params={name: " ".join(map(str, values)) for name, values in varied.items()},
        dataset=None,
    )
    tracker.open_group(config, sweep.folder)


def compare(sweep: SweepConfig, ended: Mapping[str, Status]) -> Page:
    """Compare all runs that have a loss in comparison.md and comparison.json, also in MLflow.

    Runs that an earlier command trained are included. The MLflow run of the sweep is ended.

    Args:
        ended: status of each run of this command that did not complete.
    """
    where = sweep.folder
    try:
        found, unfinished = _gather(sweep, ended)
        drawn = plots.losses_compared(found, where) if found.runs else []
        page = comparison_page.page(
            sweep.name,
            found,
            plots=drawn,
            unfinished=unfinished,
            reasons=_reasons(sweep, unfinished),
        )
        page.write(where.comparison_page)
        found.write(where.comparison)
    except Exception:
        tracker.close_group(where, status="FAILED")
        raise
    failed = "failed" in unfinished.values()
    tracker.close_group(
        where,
        [where.comparison, *drawn],
        {"comparison.html": as_html(where.comparison_page, f"sweep {sweep.name}")},
        _figures(found),
        status="FAILED" if failed else "KILLED" if unfinished else "FINISHED",
    )
    return page


def abandon(sweep: SweepConfig, ended: Mapping[str, Status], show: Callable[[Page], None]) -> None:
    """Compare the runs of an interrupted sweep with the steps that they did, and show the page."""
    with never_fatal("comparison"):
        show(compare(sweep, ended))


def _gather(sweep: SweepConfig, ended: Mapping[str, Status]) -> tuple[Comparison, dict[str, str]]:
    """Compare the runs that have a loss; also return the status of all that are not completed."""
    cache, outcomes, unfinished = sweep.run.cache_dir, [], {}
    for name in _members(sweep):
        try:
            found = outcome(cache, name)
        except (OSError, ValueError, LookupError) as error:  # damaged, or of another version
            log.warning("run %s is left out of the comparison: %s", name, error)
            found = None
        if found is None:
            unfinished[name] = ended.get(name, "without a loss")
        elif found.status != "completed":
            found = found.replace(status=ended.get(name, found.status))
            unfinished[name] = found.status
        if found:
            outcomes.append(found)
    return comparison.compare(outcomes), unfinished


def _reasons(sweep: SweepConfig, unfinished: Mapping[str, str]) -> dict[str, str]:
    """Return why the failed runs failed, as far as they recorded it."""
    cache = Cache(sweep.run.cache_dir)
    failed = [name for name, status in unfinished.items() if status == "failed"]
    found = {name: "; ".join(failures(cache.run(name))) for name in failed}
    return {name: why for name, why in found.items() if why}


def _figures(found: Comparison) -> dict[str, float]:
    """Return the figures of the sweep that MLflow shows."""
    completed = [one for one in found.runs if one.status == "completed"]
    losses = {"bpb_best": [one.val_bpb for one in completed if one.val_bpb is not None]}
    if not found.mixes_tokenizers:
        losses["best"] = [one.val_loss for one in completed]
    finite = {name: [x for x in values if math.isfinite(x)] for name, values in losses.items()}
    best = {f"sweep/val_{name}": min(values) for name, values in finite.items() if values}
    return best | ({"sweep/exponent": found.law.b} if found.law else {})


def _members(sweep: SweepConfig) -> list[str]:
    """Return the names of all runs of the sweep, including those of earlier commands."""
    asked = [str(cell.run_name) for cell in cells(sweep)]
    there = Cache(sweep.run.cache_dir).existing_runs()
    earlier = [folder.name for folder in there if _sweep_of(folder) == sweep.name]
    return list(dict.fromkeys(asked + earlier))


def _sweep_of(folder: RunFolder) -> Any:
    try:
        return artifacts.read_json(folder.settings)["sweep"]
    except (OSError, ValueError, LookupError):  # damaged, or written by another version
        return None
