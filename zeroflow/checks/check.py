"""The result of a pre-flight check."""

import logging

from pydantic import Field

from zeroflow.config import Config
from zeroflow.training import zero

log = logging.getLogger("zeroflow.checks.preflight")


class Check(Config):
    """Result of one check, with its meaning."""

    name: str
    passed: bool
    warning: bool = Field(False, exclude_if=lambda value: not value)
    """True if the check passed, but found something that the user should know."""

    figure: str
    """Measured figure, with its unit."""

    sentence: str
    """Sentence that explains the figure and, after a failure, names the change to make."""


def on_every_rank(check: Check) -> Check:
    """Return `check`, as failed if it failed on any rank. All ranks must call this together."""
    passed_on_rank0 = zero.on_rank0(lambda: check.passed)
    if not check.passed and (zero.rank() == 0 or passed_on_rank0):  # one warning, not one per rank
        log.warning("pre-flight: %s: FAILED, %s. %s", check.name, check.figure, check.sentence)
    if zero.is_any(not check.passed) and check.passed:
        sentence = "It failed on another rank: see the warning of that rank in the log"
        return check.replace(passed=False, sentence=sentence)
    return check
