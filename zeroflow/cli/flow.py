"""The command of a flow: read settings, find or start a Prefect server, run, print the result."""

import logging
import signal
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from zeroflow.cli.arguments import Parser, add_settings, read_settings
from zeroflow.cli.console import (
    Terminated,
    fail,
    log_to_console,
    page_text,
    require_writable,
    show,
    terminate,
)
from zeroflow.cli.prefect_settings import importing_prefect
from zeroflow.config import Config
from zeroflow.orchestration.names import (
    PRETRAIN,
    PROVE_RESUME,
    SWEEP,
    SWEEP_DEPLOYMENT,
    ZERO_LAB,
    zeroflow_command,
)
from zeroflow.report.progress import console
from zeroflow.report.summary import summary
from zeroflow.report.sweep import require_as_started
from zeroflow.settings.existing import size_of
from zeroflow.settings.proof import ProofRun, settings
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import require_possible
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.settings.zero_lab import ZeroLabRun, lab_run
from zeroflow.text.markup import shell_command
from zeroflow.tracking import loopback
from zeroflow.training.interpreter import without_collections
from zeroflow.training.interruption import insistent
from zeroflow.training.processes import kept_ranks

log = logging.getLogger(__name__)


class _FlowCommand(NamedTuple):
    """Differences between the commands of the flows."""

    config: type[Config]
    group: str
    """Heading in --help of the settings that belong to no group."""

    description: str
    run_of: Callable[[Any], RunConfig]
    """Returns the settings of the run, or of each run of a sweep, from the requested ones."""

    runs_of: Callable[[Any], list[RunConfig]]
    """Returns the settings of every run, complete."""

    deployment_of: Callable[[Any], str | None]
    """Deployment that the flow run belongs to, so that it can be retried in Prefect."""

    ending: Callable[[Path, RunConfig], str]
    """Returns the last lines to print, from the result of the flow."""


def _text_of(page: Path, run: RunConfig) -> str:
    return f"\n{page_text(page.read_text(encoding='utf-8'))}\n\n{page}"


def _cells(sweep: SweepConfig) -> list[RunConfig]:
    require_as_started(sweep)
    return [] if sweep.in_array else cells(sweep)  # the device of an array is on another machine


_COMMANDS = {
    PRETRAIN: _FlowCommand(
        RunConfig,
        "run",
        "Turn raw text into a trained and checked LLaMA-style language model.\n\n"
        "  zeroflow pretrain                    a few minutes on any machine\n"
        "  zeroflow pretrain --size small       on a GPU, FineWeb-Edu\n"
        "  zeroflow pretrain --data-mode files --data-path 'books/*.txt'\n\n"
        "Repeating the command resumes the run, or shows its result.",
        run_of=lambda run: run,
        runs_of=lambda run: [run],
        deployment_of=size_of,
        ending=lambda report, run: summary(report, run.cache_dir),
    ),
    SWEEP: _FlowCommand(
        SweepConfig,
        "sweep",
        "Train several sizes, seeds, learning rates or ZeRO stages one after the other, and\n"
        "compare them.\n\n"
        "  zeroflow sweep --sizes tiny small medium\n"
        "  zeroflow sweep --size tiny --seeds 0 1 2 --max-steps 100\n\n"
        "All other settings are those of a run, and apply to all runs. Repeating the command\n"
        "resumes the sweep, or shows its result.",
        run_of=lambda sweep: sweep.run,
        runs_of=_cells,
        deployment_of=lambda sweep: SWEEP_DEPLOYMENT,
        ending=_text_of,
    ),
    ZERO_LAB: _FlowCommand(
        ZeroLabRun,
        "lab",
        "Measure each stage of ZeRO on several ranks: memory by part, collectives, speed, and the\n"
        "difference of the losses from one rank, next to the formulas.\n\n"
        "  zeroflow zero-lab --gpus 2 --device cpu        two processes on a laptop\n"
        "  zeroflow zero-lab --gpus 8 --size medium\n\n"
        "All other settings are those of a run. On a CPU, the defaults are small.",
        run_of=lambda lab: lab.run,
        runs_of=lambda lab: [lab_run(lab)],
        deployment_of=lambda lab: ZERO_LAB,
        ending=_text_of,
    ),
    PROVE_RESUME: _FlowCommand(
        ProofRun,
        "proof",
        "Train twice, once undisturbed and once with repeated kills, and compare every bit.\n"
        "The defaults are small: a minute or two on a CPU.",
        run_of=lambda proof: proof.run,
        runs_of=lambda proof: [settings(proof.run)],
        deployment_of=lambda proof: None,
        ending=_text_of,
    ),
}


def add_arguments(flow: str, parser: Parser) -> None:
    """Add the settings of a flow's command, and its description, to `parser`."""
    command = _COMMANDS[flow]
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description = command.description
    add_settings(parser, command.config, command.group)
    parser.add_argument(
        "--verbose", action="store_true", help="show tracebacks, and Prefect's own lines"
    )


def main(flow: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a flow's command as a separate program, and end this process."""
    loopback.bypass_proxies()
    parser = Parser()
    add_arguments(flow, parser)
    run(flow, parser.parse_args(argv))


def run(flow: str, arguments: Namespace) -> NoReturn:
    """Run a flow's command and end this process.

    Wrong settings and files are refused before the flows are imported, which takes seconds.

    The exit code is 0, 1 for a failure, 2 for wrong settings, 130 after Ctrl-C, 143 after SIGTERM.
    """
    command, verbose = _COMMANDS[flow], arguments.verbose
    try:
        asked = command.config.model_validate(read_settings(command.config, arguments))
    except ValueError as error:
        raise SystemExit(fail(error, verbose=verbose, code=2)) from None
    log_to_console(verbose=verbose)
    try:
        require_writable(command.run_of(asked).cache_dir)
    except ValueError as error:
        raise SystemExit(fail(error, verbose=verbose)) from None
    try:
        for each in command.runs_of(asked):
            require_possible(each)
    except OSError as error:
        raise SystemExit(fail(error, verbose=verbose)) from None
    except ValueError as error:
        raise SystemExit(fail(error, verbose=verbose, code=2)) from None
    with kept_ranks() as ranks:
        if isinstance(asked, RunConfig):
            from zeroflow.pipeline import start_ranks

            start_ranks(asked, ranks)
        code = _run(flow, command, asked, verbose=verbose)

    from zeroflow.orchestration.flow_context import leave

    leave(code)


def _run(flow: str, command: _FlowCommand, asked: Any, *, verbose: bool) -> int:
    _import_flows(verbose=verbose)
    signal.signal(signal.SIGTERM, terminate)
    try:
        with insistent(signal.SIGINT, signal.SIGTERM) as stops:
            try:
                return _run_flow(flow, command, asked, verbose=verbose)
            except Exception as error:
                if stops.received:
                    return _stopped(128 + stops.received)
                return fail(error, verbose=verbose)
    except (KeyboardInterrupt, Terminated) as stop:
        return _stopped(143 if isinstance(stop, Terminated) else 130)


def _import_flows(*, verbose: bool) -> None:
    """Import the flows, which is slow: --help and errors in flags do not need them."""
    with insistent(signal.SIGINT) as stops:
        try:
            with without_collections(), importing_prefect():
                import zeroflow.orchestration.flows  # noqa: F401
        except KeyboardInterrupt:
            # Python ends like a program that SIGINT ended only for the exact class
            raise KeyboardInterrupt from None
        except ValueError as error:
            if stops.received:
                raise KeyboardInterrupt from None
            raise SystemExit(fail(error, verbose=verbose, code=2)) from None


def _run_flow(flow: str, command: _FlowCommand, asked: Any, *, verbose: bool) -> int:
    from zeroflow.orchestration import server
    from zeroflow.orchestration.flow_context import silence_console
    from zeroflow.orchestration.flow_runs import run_here
    from zeroflow.orchestration.flows import FLOWS
    from zeroflow.pipeline import may_succeed

    if not verbose:
        silence_console()
    try:
        with server.server() as address:
            log.info("Prefect UI: %s", address)
            made = run_here(FLOWS[flow], asked, deployment=command.deployment_of(asked))
            ending = command.ending(made, command.run_of(asked))
    except Exception as error:
        if may_succeed(error):
            error.add_note(f"retry: {shell_command(_own_command())}")
        raise
    show(ending)
    return 0


def _stopped(code: int) -> int:
    console.print("stopped; finished work is kept, and the same command resumes from there")
    return code


def _own_command() -> list[str]:
    """Return the command that started this process."""
    program = Path(sys.argv[0])
    if program.name == "zeroflow" or program.match("zeroflow/cli/__main__.py"):
        return [*zeroflow_command(), *sys.argv[1:]]
    return sys.orig_argv
