"""The first line of a command, printed before the libraries are imported, which takes seconds."""

import sys
import time
from collections.abc import Sequence

TIME = "%H:%M:%S"
"""Format of the time that begins a line."""


def announce(arguments: Sequence[str]) -> None:
    """Print that a command is starting, unless it only prints its help.

    Args:
        arguments: arguments of the command.
    """
    if not {"-h", "--help"} & {*arguments}:
        sys.stdout.write(f"{time.strftime(TIME)}  starting: importing PyTorch and Prefect\n")
        sys.stdout.flush()
