"""Sizes, seeds or learning rates beside each other: `python flows/sweep.py --sizes tiny small`."""

import logging
from pathlib import Path

from prefect import flow, task
from pretrain import UNCACHED, pretrain

from zeroflow import cli, orchestration, report
from zeroflow import sweep as sweeps
from zeroflow.sweep import SweepConfig

log = logging.getLogger("zeroflow")


@task(name="compare", **UNCACHED)
def compare(asked: SweepConfig, failed: list[str]) -> Path:
    page = sweeps.compare(asked, failed=failed)
    orchestration.publish(report.with_pictures(page), "comparison", asked.name)
    return page


@flow(name="sweep", persist_result=False)
def sweep(sweep: SweepConfig = SweepConfig()) -> Path:  # noqa: B008, it is frozen
    """Train every combination of what is varied, one after the other, and compare them.

    A run that fails does not stop the others; a retry, or the same command, goes on with it.

    Returns:
        the path of comparison.md
    """
    sweeps.open_group(sweep)
    failures = {}
    for cell in sweeps.cells(sweep):
        try:
            pretrain(cell)
        except Exception as error:  # of whatever kind, the next run is another
            log.error("run %s failed: %s", cell.run_name, error)
            failures[str(cell.run_name)] = error
    page = compare(sweep, list(failures))
    if failures:
        raise RuntimeError(f"{len(failures)} runs failed, see {page}: {', '.join(failures)}")
    return page


def _run(asked: SweepConfig) -> str:
    return sweep(asked).read_text(encoding="utf-8")


if __name__ == "__main__":
    orchestration.leave(cli.run_sweep(_run))
