"""What a run will need, before it starts: the device at hand, memory, time, disk."""

import os
import platform
import time
from typing import Literal

import torch

from zeroflow.config import Config
from zeroflow.model.llama import ModelConfig

NOMINAL_VOCABULARY = 128_256
"""Llama-3.1's. Token budgets are reckoned with it, so that they do not depend on the tokenizer."""

TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022: https://arxiv.org/abs/2203.15556"""

ASSUMED_MFU = 0.25
_ASSUMED_CPU_SHARE = 0.75

# Dense bf16 matrix peaks in FLOP/s, without sparsity, from the vendor's data sheets. The
# names are whole, as NVML gives them: variants of a chip differ.
_PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


class Device(Config):
    """What the run computes on."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    peak_flops: float | None = None
    """Dense bf16 FLOP/s; None where it is not known for sure."""


def find_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device to train on, found without opening a CUDA context in this process.

    Raises:
        ValueError: a GPU was asked for and PyTorch sees none.
    """
    gpus = torch.cuda.device_count()  # reads NVML and CUDA_VISIBLE_DEVICES only
    if wanted == "cuda" and not gpus:
        build = torch.version.cuda or "none: this PyTorch is built for CPUs"
        raise ValueError(f"--device cuda, but PyTorch sees no GPU (CUDA of PyTorch: {build})")
    if wanted == "cpu" or not gpus:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(kind="cpu", name=name, memory_bytes=memory)
    return _first_gpu()


def _first_gpu() -> Device:
    import pynvml  # present only where a GPU is

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    handle = (
        pynvml.nvmlDeviceGetHandleByIndex(int(first))
        if first.isdigit()
        else pynvml.nvmlDeviceGetHandleByUUID(first)
    )
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    return Device(kind="cuda", name=name, memory_bytes=memory, peak_flops=_PEAK_FLOPS.get(name))


def expected_tokens_per_second(
    model: ModelConfig, context: int, device: Device
) -> tuple[float | None, str]:
    """A rate to expect and where it comes from; None for a GPU whose peak is not known."""
    flops = model.flops_per_token(context)
    if device.kind == "cpu":
        measured = _measure_cpu_flops()
        source = f"{_ASSUMED_CPU_SHARE:.0%} of {measured / 1e9:.0f} GFLOP/s measured now"
        return _ASSUMED_CPU_SHARE * measured / flops, source
    if device.peak_flops is None:
        return None, f"the peak of {device.name} is not known"
    return ASSUMED_MFU * device.peak_flops / flops, f"assuming {ASSUMED_MFU:.0%} MFU"


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


def micro_batch_rows(model: ModelConfig, context: int, device: Device) -> int:
    """Rows that fit on the device at once beside weights, gradients and moments.

    Reckoned with 16 bytes of state and 2 of a bf16 copy a parameter, 1 GiB for each of three chunks
    of logits, and 48 bytes an activation feature and layer, as measured for this block in bf16; a
    fifth is left to the allocator. On a CPU memory is not what limits: 4 rows.
    """
    if device.kind == "cpu":
        return 4
    state = 18 * model.parameters + 3 * 2**30
    activations = 48 * model.hidden_size * model.num_hidden_layers * context
    rows = (0.8 * device.memory_bytes - state) / activations
    return max(1, int(rows))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def checkpoint_bytes(model: ModelConfig) -> int:
    """Weights and two moments in fp32."""
    return 12 * model.parameters


def duration(seconds: float) -> str:
    """Such as 42 s, 3 min 5 s, 2 h 10 min, 4 d 3 h."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    parts: list[str] = []
    for unit, size in units:
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
