"""Entry point of the program `zeroflow`: prints the first line, then runs the command."""

import sys
from collections.abc import Callable
from difflib import get_close_matches

from zeroflow.cli.early import begin
from zeroflow.cli.first_line import announce, handle_ctrl_c
from zeroflow.training.interpreter import without_collections

FLOWS = ("pretrain", "sweep", "zero-lab")
"""Commands of flows."""

LONG = (*FLOWS, "prove-resume", "ui")
"""Commands that print log lines. The output of the others is for other programs."""

SHORT = ("generate", "export", "evaluate", "data", "documents", "plan", "shards", "prefect-setup")
"""The other commands."""


def entry() -> None:
    with without_collections():
        main = _imported_command()
    raise SystemExit(main())


def _imported_command() -> Callable[[], int]:
    """Begin the command, and return its main function."""
    handle_ctrl_c()
    [name] = sys.argv[1:2] or [""]
    if name in FLOWS:
        begin(name, sys.argv[2:])
    elif name in LONG:
        announce(sys.argv[2:])
    elif name in SHORT and sys.stderr.isatty():
        announce(sys.argv[2:], output=sys.stderr)
    elif near := get_close_matches(name, () if name in SHORT else LONG + SHORT, n=1):
        sys.stderr.write(f"error: there is no command {name}: did you mean {near[0]}?\n")
        raise SystemExit(2)
    from zeroflow.cli.commands import main

    return main
