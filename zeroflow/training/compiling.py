"""Monitoring of torch.compile during training: compile time and recompilations."""

import importlib
import logging
from collections.abc import Callable

import torch

from zeroflow.training.goodput import Clock, Phase

log = logging.getLogger(__name__)

_REASONS = logging.getLogger("torch._dynamo.guards.__recompiles")
"""Logger of PyTorch's reasons for recompilations."""


def watch(clock: Clock, is_settled: Callable[[], bool]) -> None:
    """Count compilation as its own phase in `clock`, and log recompilations as warnings.

    A recompilation during a run means that a step had a new shape or setting, and it can take
    minutes. The warnings contain the reasons that PyTorch logs, unless TORCH_LOGS disables them.

    Args:
        is_settled: returns True when no more compilation is expected.
    """
    import torch._dynamo  # takes a second to import; only compiled models need it

    before: Phase = clock.phase

    def begin(_: object) -> None:
        nonlocal before
        before = clock.phase
        clock.enter("compile")

    torch._dynamo.on_compile_start(begin)
    torch._dynamo.on_compile_end(lambda _: clock.enter(before))
    torch._logging.set_logs(recompiles=True)
    _REASONS.addHandler(_Warnings(is_settled))


def import_compiler() -> None:
    """Import what torch.compile needs at its first use, which takes seconds."""
    importlib.import_module("torch._inductor.compile_fx")


def end_watch() -> None:
    """End what `watch` began, which would keep its arguments alive."""
    if _REASONS.handlers:
        _REASONS.handlers.clear()
        torch._dynamo.callback.callback_handler.clear()
        torch._logging.set_logs()


class _Warnings(logging.Handler):
    """Copies PyTorch's reasons for a recompilation to the log of the run."""

    def __init__(self, is_settled: Callable[[], bool]) -> None:
        super().__init__()
        self._is_settled = is_settled

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_settled():
            log.warning("recompiled during the run: %s", " ".join(record.getMessage().split()))
