"""What torch.compile does while a training goes on: for how long, and why again."""

import logging
from collections.abc import Callable

from zeroflow.training.goodput import Clock, Phase

log = logging.getLogger(__name__)


def watch(clock: Clock, is_settled: Callable[[], bool]) -> None:
    """Have `clock` know when something is compiled, and warn of what is compiled again.

    TORCH_LOGS, where it is set, decides whether PyTorch gives its reasons: then there may be no
    warnings.

    Args:
        is_settled: whether all that has to be compiled has been, so that more is a surprise.
    """
    import torch._dynamo  # takes a second, and only compiled models need it

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
    """Takes PyTorch's reasons for compiling again into the log of the run."""

    def __init__(self, is_settled: Callable[[], bool]) -> None:
        super().__init__()
        self._is_settled = is_settled

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_settled():
            log.warning("compiled again in mid-run: %s", " ".join(record.getMessage().split()))
