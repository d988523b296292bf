"""Sizes, seeds, rates or stages of ZeRO compared: `python flows/sweep.py --sizes tiny small`."""

import logging
import shlex
import sys
from pathlib import Path

from prefect import flow, task
from pretrain import UNCACHED, pretrain

from zeroflow import cli, orchestration, prefect_server, report
from zeroflow import sweep as sweeps
from zeroflow.sweep import SweepConfig

log = logging.getLogger("zeroflow")

PRETRAIN = (sys.executable, "flows/pretrain.py")


@task(name="compare", **UNCACHED)
def compare(asked: SweepConfig, failed: list[str]) -> Path:
    page = sweeps.compare(asked, failed=failed)
    orchestration.publish(report.with_pictures(page), "comparison", asked.name)
    return page


@flow(name=prefect_server.SWEEP, persist_result=False)
def sweep(sweep: SweepConfig = SweepConfig()) -> Path:  # noqa: B008, it is frozen
    """Train every combination of what is varied, one after the other, and compare them.

    A run that fails does not stop the others; a retry, or the same command, goes on with it.

    Returns:
        the path of comparison.md
    """
    with orchestration.logs_delivered():
        return _sweep(sweep)


def _sweep(asked: SweepConfig) -> Path:
    sweeps.require_as_started(asked)
    orchestration.name_sweep(asked.name)
    sweeps.open_group(asked)
    failed = []
    for cell in sweeps.cells(asked):
        try:
            orchestration.run_child(pretrain, cell, finished=sweeps.finished(cell))
        except Exception as error:  # of whatever kind, the next run is another
            error.add_note(f"retry: {shlex.join([*PRETRAIN, *cli.flags(cell)])}")
            log.error("run %s failed: %s", cell.run_name, cli.complaint(error))
            for note in error.__notes__:
                log.error("%s", note)
            failed.append(str(cell.run_name))
    page = compare(asked, failed)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, see {page}: {', '.join(failed)}")
    return page


if __name__ == "__main__":
    orchestration.leave(cli.run_sweep(sweep))
