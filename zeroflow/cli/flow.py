"""TODO docstring."""

import argparse
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
)

from pydantic import ValidationError

from zeroflow.report.progress import console
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import size_of
from zeroflow.settings.sweep import SweepConfig

if TYPE_CHECKING:
    from zeroflow.orchestration.flow_runs import RunFlow
from zeroflow.cli.console import Terminated, fail, log_to_console, require_writable, terminate
from zeroflow.cli.flags import Settings, add_settings, read_settings

log = logging.getLogger(__name__)


def run_flow(flow: "RunFlow", argv: Sequence[str] | None = None) -> int:
    """The command of a flow: parse, have a Prefect server, run, and say how it ended."""

    def start(run: RunConfig) -> str:
        from zeroflow.orchestration.flow_runs import run_here

        report = run_here(flow, run, deployment=size_of(run))
        return _ending(report, run.cache_dir)

    description = (
        "Raw text to a trained and checked LLaMA-style language model.\n\n"
        "  python flows/pretrain.py                    a few minutes on any machine\n"
        "  python flows/pretrain.py --size small       on a GPU, FineWeb-Edu\n"
        "  python flows/pretrain.py --data-mode files --data-path 'books/*.txt'\n\n"
        "The same command again goes on where it stopped, or shows what it made."
    )
    return _with_prefect(RunConfig, "run", description, argv, lambda run: run.cache_dir, start)


def run_sweep(flow: "RunFlow", argv: Sequence[str] | None = None) -> int:
    """The command of the sweep's flow, like `run_flow`."""

    def start(sweep: SweepConfig) -> str:
        from zeroflow.orchestration import server
        from zeroflow.orchestration.flow_runs import run_here

        page = run_here(flow, sweep, deployment=server.SWEEP_DEPLOYMENT)
        return page.read_text(encoding="utf-8")

    description = (
        "Train several sizes, seeds or learning rates one after the other, and compare them.\n\n"
        "  python flows/sweep.py --sizes tiny small medium\n"
        "  python flows/sweep.py --size tiny --seeds 0 1 2 --max-steps 100\n\n"
        "All other settings are those of a run, and the same for all. The same command again goes\n"
        "on where it stopped, or shows what it made."
    )
    return _with_prefect(
        SweepConfig, "sweep", description, argv, lambda sweep: sweep.run.cache_dir, start
    )


def _with_prefect(
    config: type[Settings],
    title: str,
    description: str,
    argv: Sequence[str] | None,
    cache_of: Callable[[Settings], Path],
    start: Callable[[Settings], str],
) -> int:
    """Read settings from the command line and `start` with a Prefect server; an exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # a misspelt flag is an error
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
    )
    add_settings(parser, config, title)
    parser.add_argument(
        "--verbose", action="store_true", help="tracebacks, and Prefect's own lines"
    )
    arguments = parser.parse_args(argv)
    try:
        asked = config.model_validate(read_settings(config, arguments))
    except ValidationError as error:
        return fail(error, verbose=arguments.verbose, code=2)
    # they take seconds to import: after --help and wrong flags
    from zeroflow.orchestration import server
    from zeroflow.orchestration.flow_runs import silence_console

    if not arguments.verbose:
        silence_console()
    log_to_console(verbose=arguments.verbose)
    signal.signal(signal.SIGTERM, terminate)
    try:
        require_writable(cache_of(asked))
        with server.server() as address:
            log.info("Prefect UI: %s", address)
            ending = start(asked)
        console.print(ending, markup=False)
        return 0
    except (KeyboardInterrupt, Terminated) as stop:
        console.print("stopped; what is complete is kept, and the same command goes on from there")
        return 143 if isinstance(stop, Terminated) else 130
    except Exception as error:
        if not isinstance(error, ValueError):  # of which the same command would only get another
            error.add_note(f"retry: {shlex.join(sys.orig_argv)}")
        return fail(error, verbose=arguments.verbose)


def _ending(report: Path, cache: Path) -> str:
    from zeroflow.report.summary import summary

    return summary(report, cache)
