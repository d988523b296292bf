"""Sizes, seeds, rates or stages of ZeRO compared: `python flows/sweep.py --sizes tiny small`."""

import logging
import shlex
import sys
from pathlib import Path

from prefect import flow, task
from pretrain import UNCACHED, pretrain

from zeroflow.cli import flags
from zeroflow.cli.console import complaint
from zeroflow.cli.flow import run_sweep
from zeroflow.orchestration import pages, server
from zeroflow.orchestration.flow_runs import leave, logs_delivered, name_sweep, run_child
from zeroflow.report import sweep as sweeps
from zeroflow.report.pages import with_pictures
from zeroflow.settings.sweep import SweepConfig, cells

log = logging.getLogger("zeroflow")

PRETRAIN = (sys.executable, "flows/pretrain.py")


@task(name="compare", **UNCACHED)
def compare(asked: SweepConfig, failed: list[str]) -> Path:
    page = sweeps.compare(asked, failed=failed)
    pages.publish(with_pictures(page), "comparison", asked.name)
    return page


@flow(name=server.SWEEP, persist_result=False)
def sweep(sweep: SweepConfig = SweepConfig()) -> Path:  # noqa: B008, it is frozen
    """Train every combination of what is varied, one after the other, and compare them.

    A run that fails does not stop the others; a retry, or the same command, goes on with it.

    Returns:
        the path of comparison.md
    """
    with logs_delivered():
        return _sweep(sweep)


def _sweep(asked: SweepConfig) -> Path:
    sweep.require_as_started(asked)
    name_sweep(asked.name)
    sweep.open_group(asked)
    failed = []
    for cell in cells(asked):
        try:
            run_child(pretrain, cell, finished=sweep.finished(cell))
        except Exception as error:  # of whatever kind, the next run is another
            error.add_note(f"retry: {shlex.join([*PRETRAIN, *flags.flags(cell)])}")
            log.error("run %s failed: %s", cell.run_name, complaint(error))
            for note in error.__notes__:
                log.error("%s", note)
            failed.append(str(cell.run_name))
    page = compare(asked, failed)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, see {page}: {', '.join(failed)}")
    return page


if __name__ == "__main__":
    leave(run_sweep(sweep))
