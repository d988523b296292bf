"""Prediction of tokens per second from FLOPs and measured utilisation."""

import math
import time

import numpy as np
import torch

from zeroflow.device import Device
from zeroflow.training.workload import Workload

# Utilisation by parameters, measured on an H100: tiny with a vocabulary of 32,768, then tiny, small
# and medium with Llama-3.1's. benchmarks/RESULTS.md has the figures
_MEASURED_MFU = {15e6: 0.28, 46e6: 0.35, 318e6: 0.48, 1.345e9: 0.52}
_MEASURED_MFU_FP8 = {46e6: 0.33, 318e6: 0.49, 1.345e9: 0.59}
_MEASURED_MFU_EAGER = {15e6: 0.17, 46e6: 0.26, 318e6: 0.29, 1.345e9: 0.33}

_ASSUMED_CPU_SHARE = 0.75
"""Assumed FLOP/s of a training on a CPU, as a fraction of those of a matrix product."""


def assumed_mfu(work: Workload) -> float:
    """Return the fraction of the bf16 peak that an H100 reached with this number of parameters."""
    measured = _MEASURED_MFU_FP8 if work.fp8 else _MEASURED_MFU
    if not work.compile:
        measured = _MEASURED_MFU_EAGER
    sizes = [math.log(parameters) for parameters in measured]
    return float(np.interp(math.log(work.model.parameters), sizes, list(measured.values())))


def expected_tokens_per_second(work: Workload, device: Device) -> tuple[float | None, str]:
    """Return the expected tokens per second of one rank, and the source of the figure.

    The first is None if nothing similar has been measured.
    """
    flops = work.flops_per_token * (1 + _recomputed_share(work))
    if device.kind == "cpu":
        measured = _measure_cpu_flops()
        source = f"{_ASSUMED_CPU_SHARE:.0%} of {measured / 1e9:.0f} GFLOP/s measured now"
        return _ASSUMED_CPU_SHARE * measured / flops, source
    if device.peak_flops is None:
        return None, f"the peak of {device.name} is not known"
    if work.precision == "fp32":
        return None, f"the peak of {device.name} is known only in bf16"
    if work.fp8 and not work.compile:
        return None, "fp8 was measured only with compiled code"
    mfu, usual = assumed_mfu(work), assumed_mfu(work.replace(fp8=False, compile=True))
    source = f"assuming {mfu:.0%} MFU, as measured on an H100 at this size"
    if not work.compile:
        source += f" without torch.compile, and {usual:.0%} with it"
    if work.fp8:
        source += f" with fp8 and {usual:.0%} without"
    if work.activation_checkpointing != "none":
        source += ", minus the time of recomputation"
    return mfu * device.peak_flops / flops, source


def _recomputed_share(work: Workload) -> float:
    """FLOPs of recomputation, relative to those of the forward and backward pass."""
    parts = work.model.parameters_by_part
    recomputed = {
        "none": 0,
        "selective": parts["feed-forward"],
        "full": parts["feed-forward"] + parts["attention"],
    }[work.activation_checkpointing]
    return recomputed / work.model.parameters / 3  # the backward pass takes two thirds


def _measure_cpu_flops(seconds: float = 0.2) -> float:
    """Return the sustained FLOP/s of fp32 matrix products with the threads of this process."""
    n = 768
    a, b = torch.rand(n, n), torch.rand(n, n)
    a @ b  # the first one also allocates
    start, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        a @ b
        products += 1
    return 2 * n**3 * products / elapsed
