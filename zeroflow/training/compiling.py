"""Monitoring of torch.compile during a training: time and recompilations."""

import logging
from collections.abc import Callable

from zeroflow.training.goodput import Clock, Phase

log = logging.getLogger(__name__)


def watch(clock: Clock, is_settled: Callable[[], bool]) -> None:
    """Count compilation as its own phase in `clock`, and log recompilations as warnings.

    A recompilation in mid-run means that a step had a new shape or setting, and takes minutes.
    The warnings contain PyTorch's log of the reasons, which TORCH_LOGS turns on or off if set.

    Args:
        is_settled: returns True once everything should be compiled.
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
    reasons = logging.getLogger("torch._dynamo.guards.__recompiles")
    reasons.addHandler(_Warnings(is_settled))


class _Warnings(logging.Handler):
    """Passes PyTorch's reasons for a recompilation to the log of the run."""

    def __init__(self, is_settled: Callable[[], bool]) -> None:
        super().__init__()
        self._is_settled = is_settled

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_settled():
            log.warning("recompiled in mid-run: %s", " ".join(record.getMessage().split()))
