"""The flows: the pipeline with its stages as Prefect tasks, shown in Prefect's pages."""

import shlex
import sys
from pathlib import Path
from typing import Any

from prefect import Flow, flow

from zeroflow import pipeline
from zeroflow.orchestration.flow_context import logs_delivered
from zeroflow.orchestration.flow_runs import run_child
from zeroflow.orchestration.names import PRETRAIN, PROVE_RESUME, SWEEP
from zeroflow.orchestration.stages import STAGES, build_part
from zeroflow.orchestration.view import PrefectView
from zeroflow.report import sweep as sweeps
from zeroflow.settings import flags
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig

VIEW = PrefectView(build_part)


@flow(name=PRETRAIN, persist_result=False)
def pretrain(run: RunConfig = RunConfig()) -> Path:  # noqa: B008, it is frozen
    """Turn raw text into a checked model; a run of the same name is resumed.

    Returns:
        the path of the run's report.json
    """
    with logs_delivered():
        return pipeline.pretrain(run, STAGES, VIEW)


@flow(name=SWEEP, persist_result=False)
def sweep(sweep: SweepConfig = SweepConfig()) -> Path:  # noqa: B008, it is frozen
    """Train every combination of the varied settings, one after the other, and compare the runs.

    A failed run does not stop the others; a retry, or the same command, resumes it.

    Returns:
        the path of comparison.md
    """
    with logs_delivered():
        return pipeline.sweep(sweep, _run_child, STAGES, VIEW)


@flow(name=PROVE_RESUME, persist_result=False)
def prove_resume(asked: ProofRun = ProofRun()) -> Path:  # noqa: B008, it is frozen
    """Train undisturbed and killed, and compare every bit.

    Returns:
        the path of proof.md
    """
    with logs_delivered():
        return pipeline.prove_resume(asked, STAGES, VIEW)


def _run_child(cell: RunConfig) -> None:
    try:
        run_child(pretrain, cell, finished=sweeps.finished(cell))
    except Exception as error:
        command = [sys.executable, "-m", "zeroflow.cli", PRETRAIN, *flags.flags(cell)]
        error.add_note(f"retry: {shlex.join(command)}")
        raise


FLOWS: dict[str, Flow[[Any], Path]] = {flow.name: flow for flow in (pretrain, sweep, prove_resume)}
