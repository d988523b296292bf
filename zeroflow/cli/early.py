"""Work that a flow's command starts before it imports its libraries, which takes seconds."""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from zeroflow.cli.first_line import announce


def begin(flow: str, arguments: Sequence[str]) -> None:
    """Print the first line, and start the rank and the Prefect server that the command will need.

    Both start while the libraries are imported, which takes about as long. If the settings turn out
    to be wrong, they end with the command.

    Args:
        flow: name of the flow.
        arguments: arguments of the command.
    """
    announce(arguments)
    if {"-h", "--help"} & {*arguments}:
        return
    if flow == "pretrain":
        with suppress(ArgumentError, ValueError):  # the command reports them later
            _start_ranks(arguments)
    _start_server()


def _start_ranks(arguments: Sequence[str]) -> None:
    """Start the ranks that the flags ask for; they are ended if the run needs different ones."""
    from zeroflow.run_folder import DEFAULT_CACHE, Cache
    from zeroflow.training.processes import keep_from_now

    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--run-name")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    asked, _ = parser.parse_known_args(arguments)
    if asked.nodes > 1:
        return  # the ranks of several machines are started in another way
    cache = Cache(asked.cache_dir.resolve())
    keep_from_now().start_for_run(cache, asked.run_name, asked.gpus)


def _start_server() -> None:
    from zeroflow.cli.prefect_settings import make_home_private
    from zeroflow.orchestration import early_server

    with suppress(ValueError):  # the command reports it later
        make_home_private()
        early_server.start()
