"""The flows: the pipeline with its stages as Prefect tasks."""

from pathlib import Path
from typing import Annotated, Any

from prefect import Flow, flow
from prefect.states import State
from pydantic import WithJsonSchema

from zeroflow import pipeline
from zeroflow.orchestration import form
from zeroflow.orchestration.conclusion import conclude
from zeroflow.orchestration.flow_context import name_at_start
from zeroflow.orchestration.flow_runs import run_child
from zeroflow.orchestration.names import (
    PRETRAIN,
    PROVE_RESUME,
    SWEEP,
    ZERO_LAB,
    zeroflow_command,
)
from zeroflow.orchestration.stages import STAGES
from zeroflow.orchestration.view import PrefectView
from zeroflow.report import sweep as sweeps
from zeroflow.settings import flags
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig
from zeroflow.settings.zero_lab import ZeroLabRun
from zeroflow.text.markup import shell_command

RunForm = Annotated[RunConfig, WithJsonSchema(form.schema(RunConfig))]
SweepForm = Annotated[SweepConfig, WithJsonSchema(form.schema(SweepConfig))]
ZeroLabForm = Annotated[ZeroLabRun, WithJsonSchema(form.schema(ZeroLabRun))]
"""Parameters of the flows that have deployments."""

# `validate_parameters` is off, because wrong settings are reported like every other failure


@flow(
    name=PRETRAIN,
    flow_run_name=name_at_start(PRETRAIN, RunConfig),
    persist_result=False,
    validate_parameters=False,
)
def pretrain(run: RunForm) -> Path | State:
    """Turn raw text into a checked model; a run of the same name is resumed.

    Returns:
        The path of the run's report.json.
    """
    view = PrefectView()
    return conclude(RunConfig, run, lambda asked: pipeline.pretrain(asked, STAGES, view), view)


@flow(
    name=SWEEP,
    flow_run_name=name_at_start(SWEEP, SweepConfig),
    persist_result=False,
    validate_parameters=False,
)
def sweep(sweep: SweepForm) -> Path | State:
    """Train every combination of the varied settings, one after the other, and compare the runs.

    A failed run does not stop the others; a retry, or the same command, resumes it.

    Returns:
        The path of comparison.md.
    """
    view = PrefectView()

    def work(asked: SweepConfig) -> Path:
        return pipeline.sweep(asked, _run_child, STAGES, view)

    return conclude(SweepConfig, sweep, work, view)


@flow(
    name=PROVE_RESUME,
    flow_run_name=name_at_start(PROVE_RESUME, ProofRun),
    persist_result=False,
    validate_parameters=False,
)
def prove_resume(asked: ProofRun) -> Path | State:
    """Train undisturbed and with kills, and compare every bit.

    Returns:
        The path of proof.md.
    """
    view = PrefectView()
    return conclude(ProofRun, asked, lambda run: pipeline.prove_resume(run, STAGES, view), view)


@flow(
    name=ZERO_LAB,
    flow_run_name=name_at_start(ZERO_LAB, ZeroLabRun),
    persist_result=False,
    validate_parameters=False,
)
def zero_lab(lab: ZeroLabForm) -> Path | State:
    """Measure each stage of ZeRO: memory, collectives, speed and losses, next to the formulas.

    Returns:
        The path of zero_lab.md.
    """
    view = PrefectView()
    return conclude(
        ZeroLabRun, lab, lambda asked: pipeline.zero_laboratory(asked, STAGES, view), view
    )


def _run_child(cell: RunConfig) -> None:
    try:
        run_child(pretrain, cell, finished=sweeps.finished(cell))
    except Exception as error:
        if pipeline.may_succeed(error):
            command = [*zeroflow_command(), PRETRAIN, *flags.flags(cell)]
            error.add_note(f"retry: {shell_command(command)}")
        raise


FLOWS: dict[str, Flow[[Any], Path | State]] = {
    flow.name: flow for flow in (pretrain, sweep, prove_resume, zero_lab)
}
