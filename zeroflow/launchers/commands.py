"""Runs the commands of schedulers."""

import logging
import shlex
import subprocess
import time
from collections.abc import Callable

from zeroflow.training.failures import TrainingFailed

log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
"""Minimum time between two requests to a scheduler."""


def run(*command: str) -> str:
    """Return the output of a command.

    Raises:
        TrainingFailed: the command failed, or is not installed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise TrainingFailed(
            f"{command[0]} was not found: run this on a machine that has it, or use another "
            "--launcher"
        ) from error
    if done.returncode:
        raise TrainingFailed(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def seldom(ask: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that calls `ask` at most every few seconds and otherwise returns its last
    answer.
    """
    answer, again = True, 0.0

    def asked() -> bool:
        nonlocal answer, again
        if time.monotonic() > again:
            answer, again = ask(), time.monotonic() + _LOOK_SECONDS
        return answer

    return asked
