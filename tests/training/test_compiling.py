"""Monitoring of torch.compile during training."""

import time

import torch
from torch import nn

from zeroflow.training import compiling
from zeroflow.training.goodput import Clock


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def test_compilation_is_timed_and_recompilation_during_a_run_is_a_warning_with_its_reason(caplog):
    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == compiling.__name__]

    clock, settled = Clock(time.time(), device="cpu"), False
    layer = Layer()
    layer.compile(backend="aot_eager", dynamic=False)  # which makes no C++, and compiles as often
    compiling.watch(clock, is_settled=lambda: settled)
    try:
        clock.enter("logging")  # of a first step
        clock.enter("forward_backward")
        for rows in (4, 4):
            layer(torch.randn(rows, 8)).sum().backward()
        clock.settle()
        compiled = clock.seconds["compile"]
        assert compiled > 0 and clock.phase == "forward_backward"
        layer(torch.randn(5, 8))
        assert not warnings(), "which is a matter of course in the first steps"
        settled = True
        layer(torch.randn(6, 8))
        [warning] = warnings()
        assert "recompiled during the run: Recompiling function forward" in warning
        assert "size mismatch at index 0. expected" in warning and "\n" not in warning
        clock.settle()
        assert clock.seconds["compile"] > compiled
    finally:
        torch._dynamo.reset()
        torch._logging.set_logs()
