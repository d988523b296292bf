"""Prediction of tokens per second from FLOPs and measured utilisation."""

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple, Self

import numpy as np
import torch

from zeroflow.config import Config
from zeroflow.device import Device, Load
from zeroflow.training.workload import Workload

# Utilisation by parameters, measured on an H100: tiny with a vocabulary of 32,768, then tiny, small
# and medium with Llama-3.1's. In fp8, small and medium were measured on an H200.
# benchmarks/RESULTS.md has the figures
_MEASURED_MFU = {15e6: 0.28, 46e6: 0.35, 318e6: 0.48, 1.345e9: 0.52}
_MEASURED_MFU_FP8 = {46e6: 0.33, 318e6: 0.61, 1.345e9: 0.70}
_MEASURED_MFU_EAGER = {15e6: 0.17, 46e6: 0.26, 318e6: 0.29, 1.345e9: 0.33}

# FLOP/s of training on a CPU, relative to those of a matrix product, by number of parameters: the
# best of ten measurements with torch 2.13 on two cores that were also used by other programs; for
# 15M parameters, on idle cores
_MEASURED_CPU_SHARE = {35e3: 0.02, 164e3: 0.08, 1e6: 0.2, 5.2e6: 0.5, 15e6: 0.75}

_IDLE_CPU_SHARE = {35e3: 0.09, 164e3: 0.2, 1e6: 0.35, 5.2e6: 0.6, 15e6: 0.75}
"""Highest share of the FLOP/s of idle cores, by number of parameters: the fastest steps of
micro-batches of 64 to 16,384 tokens, measured with torch 2.13 on two cores. Small models reach it
with some micro-batches only."""

_CPU_SLOWEST, _CPU_FASTEST = 0.25, 1.3
"""Factors of the range of speeds on a CPU. The low end is relative to the expected speed, the high
end to that speed or to the speed on idle cores, whichever is higher. Other programs slowed training
to a quarter, but slowed the matrix product, on which the expected speed is based, by less."""

_CROWDED = 0.4
"""Factor of the low end if more programs than cores are running, as the threads of a step wait for
each other. Three small models reached 16 %, 29 % and 36 % of the expected speed on two cores at a
load average of 13 to 19."""

_GPU_RANGE = (0.6, 1.2)
"""Range of the speed on a GPU, relative to the speed at the utilisation of an H100."""

CPU_MEASUREMENT_SECONDS = 0.2
"""Duration of the measurement of matrix products."""


class Rate(Config):
    """Tokens per second, and the range to expect."""

    low: float
    expected: float
    high: float

    @classmethod
    def around(cls, rates: Sequence[float], margins: tuple[float, float]) -> Self:
        """Return the mean of measured rates, with margins around the lowest and the highest."""
        below, above = margins
        return cls(low=below * min(rates), expected=fmean(rates), high=above * max(rates))

    def times(self, factor: float) -> Self:
        return self.replace(
            low=factor * self.low, expected=factor * self.expected, high=factor * self.high
        )


class Speed(NamedTuple):
    """Expected speed of a workload."""

    rate: Rate | None
    """None if nothing similar has been measured."""

    source: str
    """Basis of the figure, or the reason why there is none."""


def assumed_mfu(work: Workload) -> float:
    """Return the fraction of the bf16 peak that an H100 reached with this number of parameters."""
    measured = _MEASURED_MFU_FP8 if work.fp8 else _MEASURED_MFU
    if not work.compile:
        measured = _MEASURED_MFU_EAGER
    return _between(measured, work.model.parameters)


def _between(measured: Mapping[float, float], parameters: int) -> float:
    """Interpolate between figures that were measured at some numbers of parameters."""
    sizes = [math.log(size) for size in measured]
    return float(np.interp(math.log(parameters), sizes, list(measured.values())))


def expected_speed(work: Workload, device: Device, load: Load | None = None) -> Speed:
    """Return the expected speed of one rank, without earlier runs.

    Args:
        load: other programs on the cores of a CPU; they slow down the measurement made now, and
            may end.
    """
    flops = work.flops_per_token * (1 + _recomputed_share(work))
    if device.kind == "cpu":
        measured = _measure_cpu_flops()
        share = _between(_MEASURED_CPU_SHARE, work.model.parameters)
        usual = share * measured / flops
        low = _CPU_SLOWEST * usual
        if load and load.average > load.cores:
            low *= _CROWDED
        rate = Rate(low=low, expected=usual, high=max(_CPU_FASTEST * usual, fastest_on_cpu(work)))
        return Speed(rate, f"{share:.0%} of {measured / 1e9:.0f} GFLOP/s measured now")
    if device.peak_flops is None:
        return Speed(None, f"the peak of {device.name} is not known")
    if work.precision == "fp32":
        return Speed(None, f"the peak of {device.name} is known only in bf16")
    if work.fp8 and not work.compile:
        return Speed(None, "fp8 was measured only with compiled code")
    mfu, usual = assumed_mfu(work), assumed_mfu(work.replace(fp8=False, compile=True))
    source = f"assuming {mfu:.0%} MFU, as measured on an H100 or H200 at this size"
    if not work.compile:
        source += f" without torch.compile, and {usual:.0%} with it"
    if work.fp8:
        source += f" with fp8 and {usual:.0%} without"
    if work.activation_checkpointing != "none":
        source += ", minus the time of recomputation"
    source += f"; {device.name} has a peak of {device.peak_flops / 1e12:.0f} TFLOP/s"
    return Speed(Rate.around([mfu * device.peak_flops / flops], _GPU_RANGE), source)


def _recomputed_share(work: Workload) -> float:
    """Return the FLOPs of recomputation, relative to those of forward and backward pass."""
    parts = work.model.parameters_by_part
    recomputed = {
        "none": 0,
        "selective": parts["feed-forward"],
        "full": parts["feed-forward"] + parts["attention"],
    }[work.activation_checkpointing]
    return recomputed / work.model.parameters / 3  # the backward pass takes two thirds


def fastest_on_cpu(work: Workload) -> float:
    """Return the highest speed to expect, in tokens per second, if this machine is idle."""
    share = _CPU_FASTEST * _between(_IDLE_CPU_SHARE, work.model.parameters)
    return share * _measure_idle_flops() / (work.flops_per_token * (1 + _recomputed_share(work)))


def _measure_cpu_flops() -> float:
    """Return the FLOP/s of fp32 matrix products with the threads of this process now."""
    n = 768
    a, b = torch.rand(n, n), torch.rand(n, n)
    a @ b  # the first one also allocates
    start, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < CPU_MEASUREMENT_SECONDS:
        a @ b
        products += 1
    return 2 * n**3 * products / elapsed


def _measure_idle_flops(seconds: float = 0.05) -> float:
    """Return the FLOP/s that the threads of this process would reach on idle cores.

    They are those of the fastest product of one thread, times the number of threads. Such a product
    takes a millisecond, so some of them run without interruption, even on a busy machine. A product
    of several threads rarely does, because each thread waits for the others.
    """
    n, threads = 384, torch.get_num_threads()
    a, b = torch.rand(n, n), torch.rand(n, n)
    torch.set_num_threads(1)
    try:
        a @ b
        times = [time.perf_counter()]
        while times[-1] - times[0] < seconds:
            a @ b
            times.append(time.perf_counter())
    finally:
        torch.set_num_threads(threads)
    return threads * 2 * n**3 / min(end - begin for begin, end in pairwise(times))
