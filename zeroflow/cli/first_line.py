"""The first line of a command, printed before the libraries are imported, which takes seconds."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

TIME = "%H:%M:%S"
"""Format of the time that begins a line."""


def announce(arguments: Sequence[str], output: TextIO | None = None) -> None:
    """Print that a command is starting, unless it only prints its help.

    Args:
        arguments: arguments of the command.
        output: standard output by default.
    """
    if not {"-h", "--help"} & {*arguments}:
        output, libraries = output or sys.stdout, "PyTorch" if output else "PyTorch and Prefect"
        output.write(f"{time.strftime(TIME)}  starting: importing {libraries}\n")
        output.flush()
