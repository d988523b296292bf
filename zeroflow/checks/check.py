"""The result of a pre-flight check."""

import logging

from pydantic import Field

from zeroflow.config import Config, flag
from zeroflow.model.llama import Shape
from zeroflow.training import zero
from zeroflow.training.workload import SETTING_NAMES, Workload

log = logging.getLogger("zeroflow.checks.preflight")


_SETTINGS = {*Shape.model_fields, *Workload.model_fields} | {
    *("seed", "learning_rate", "z_loss", "overfit_steps", "overfit_loss", "vocab_size")
}
"""Fields of a check's identity that are settings of the same name."""


def named(field: str) -> str:
    """The flag of a field of a check's identity, such as training.seed; otherwise the field."""
    *groups, name = field.split(".")
    if groups[-1:] == ["optimizer"]:
        return flag(f"optimizer.{name}")
    if "schedule" in groups:
        return f"{name.replace('_', ' ')} of the check"  # not of the run
    if not groups and name not in ("learning_rate", "seed"):
        return field
    name = SETTING_NAMES.get(name, name)
    return flag(name) if name in _SETTINGS | {*SETTING_NAMES.values()} else field


class Check(Config):
    """Result of one check, with its meaning."""

    name: str
    passed: bool
    warning: bool = Field(False, exclude_if=lambda value: not value)
    """True if the check passed, but found something that the user should know."""

    figure: str
    """Measured figure, with its unit."""

    may_pass_again: bool = Field(False, exclude_if=lambda value: not value)
    """True if the same check may pass when the command is repeated, without other settings."""

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
