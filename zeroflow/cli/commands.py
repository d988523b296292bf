"""The `zeroflow` command: train, plan a run, use its results, start the user interfaces."""

import sys
from collections.abc import Sequence

from zeroflow.cli import flow, model_commands, run_commands, server_commands
from zeroflow.cli.arguments import Parser
from zeroflow.cli.console import fail, log_to_console
from zeroflow.orchestration.names import PRETRAIN, SWEEP, ZERO_LAB
from zeroflow.tracking import loopback

_FLOWS = {
    PRETRAIN: "train and check a model",
    SWEEP: "train several models and compare them",
    ZERO_LAB: "measure the stages of ZeRO: memory, communication, speed and losses",
}

_COMMANDS = (*model_commands.COMMANDS, *run_commands.COMMANDS, *server_commands.COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `zeroflow` command; the commands of flows end this process.

    Returns:
        Exit code: 0, 1 for a failure, 130 after Ctrl-C.
    """
    loopback.bypass_proxies()
    arguments = parser()[0].parse_args(argv)
    if arguments.command in _FLOWS:
        flow.run(arguments.command, arguments)
    is_json = getattr(arguments, "json", False)  # then standard output has nothing else
    log_to_console(verbose=arguments.verbose, output=sys.stderr if is_json else None)
    try:
        arguments.run_command(arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return fail(error, verbose=arguments.verbose)


def parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of `zeroflow`, and that of each command."""
    parser = Parser(prog="zeroflow", description="Train language models and use them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _FLOWS.items():
        flow.add_arguments(name, commands.add_parser(name, help=text))
    for command in _COMMANDS:
        added = commands.add_parser(
            command.name, help=command.help, description=command.description
        )
        command.add_arguments(added)
        added.add_argument("--verbose", action="store_true", help="show tracebacks")
        added.set_defaults(run_command=command.run)
    return parser, commands.choices


def entry() -> None:
    raise SystemExit(main())
