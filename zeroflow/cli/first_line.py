"""The first line of a command, printed before the libraries are imported, which takes seconds."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

TIME = "%H:%M:%S"
"""Format of the time that begins a line."""


def handle_ctrl_c() -> None:
    """Report Ctrl-C in one line; until the libraries are imported, nothing else handles it."""
    sys.excepthook = _one_line_for_ctrl_c


def _one_line_for_ctrl_c(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
    else:
        sys.__excepthook__(kind, error, traceback)


def announce(arguments: Sequence[str], output: TextIO | None = None) -> None:
    """Print that a command is starting, unless it only prints its help.

    Args:
        arguments: arguments of the command.
        output: standard output by default.
    """
    handle_ctrl_c()
    if not {"-h", "--help"} & {*arguments}:
        output, libraries = output or sys.stdout, "PyTorch" if output else "PyTorch and Prefect"
        output.write(f"{time.strftime(TIME)}  starting: importing {libraries}\n")
        output.flush()
