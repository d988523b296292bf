"""Tokens per second before a run, from FLOPs and measured utilisation."""

import math
import time

import numpy as np
import torch

from zeroflow.device import Device, Precision
from zeroflow.model.llama import ModelConfig, Recompute

_MEASURED_MFU = {15e6: 0.28, 46e6: 0.35, 318e6: 0.48, 1.345e9: 0.52}


_MEASURED_MFU_FP8 = {46e6: 0.33, 318e6: 0.49, 1.345e9: 0.59}


_MEASURED_MFU_EAGER = {15e6: 0.17, 46e6: 0.26, 318e6: 0.29, 1.345e9: 0.33}
"""By parameters on an H100: of tiny with a vocabulary of 32,768, and of tiny, small and medium with
Llama-3.1's: `benchmarks/README.md`. Eager is without torch.compile."""


_ASSUMED_CPU_SHARE = 0.75


def assumed_mfu(model: ModelConfig, *, fp8: bool = False, compiled: bool = True) -> float:
    """What a model of as many parameters has reached on an H100, as a share of its bf16 peak."""
    measured = _MEASURED_MFU_FP8 if fp8 else _MEASURED_MFU
    if not compiled:
        measured = _MEASURED_MFU_EAGER
    sizes = [math.log(parameters) for parameters in measured]
    return float(np.interp(math.log(model.parameters), sizes, list(measured.values())))


def expected_tokens_per_second(
    model: ModelConfig,
    context: int,
    device: Device,
    checkpointing: Recompute = "none",
    *,
    precision: Precision | None = None,
    fp8: bool = False,
    compiled: bool = True,
) -> tuple[float | None, str]:
    """A rate to expect and where it comes from; None where nothing near it has been measured.

    Args:
        precision: None for that which is usual on the device.
        compiled: of a GPU; on a CPU it is not looked at.
    """
    flops = model.flops_per_token(context) * (1 + _computed_again(model, checkpointing))
    if device.kind == "cpu":
        measured = _measure_cpu_flops()
        source = f"{_ASSUMED_CPU_SHARE:.0%} of {measured / 1e9:.0f} GFLOP/s measured now"
        return _ASSUMED_CPU_SHARE * measured / flops, source
    if device.peak_flops is None:
        return None, f"the peak of {device.name} is not known"
    if precision == "fp32":
        return None, f"the peak of {device.name} is known in bf16 only"
    if fp8 and not compiled:
        return None, "fp8 was measured with compiled code only"
    mfu = assumed_mfu(model, fp8=fp8, compiled=compiled)
    source = f"assuming {mfu:.0%} MFU, as an H100 had at this size"
    if not compiled:
        source += f" without torch.compile, and {assumed_mfu(model):.0%} with it"
    if fp8:
        source += f" with fp8 and {assumed_mfu(model):.0%} without"
    if checkpointing != "none":
        source += ", less what is computed again"
    return mfu * device.peak_flops / flops, source


def _computed_again(model: ModelConfig, checkpointing: Recompute) -> float:
    """Share of the FLOPs of forward and backward that are done once more."""
    parts = model.parameters_by_part
    again = {
        "none": 0,
        "selective": parts["feed-forward"],
        "full": parts["feed-forward"] + parts["attention"],
    }
    return again[checkpointing] / model.parameters / 3  # backward is twice forward


def _measure_cpu_flops(seconds: float = 0.2) -> float:
    """Sustained fp32 matrix FLOP/s of this process's threads."""
    n = 768
    a, b = torch.rand(n, n), torch.rand(n, n)
    a @ b
    start, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        a @ b
        products += 1
    return 2 * n**3 * products / elapsed
