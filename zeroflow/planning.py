"""What a run will need, before it starts: the device at hand, memory, time, disk."""

import os
import platform
import time
from itertools import count, takewhile
from typing import Literal, NamedTuple, get_args

import torch

from zeroflow.config import Config
from zeroflow.model.llama import ModelConfig, Recompute

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


def logits_bytes(gpu_memory: int | None) -> int:
    """Size of the logits that the loss holds at once; `gpu_memory` is None on a CPU.

    Large chunks are faster on a GPU, as the matrix's gradient is read and written for each.
    """
    return 2**30 if gpu_memory is None else gpu_memory // 20


class Memory(NamedTuple):
    """What a step holds at its fullest, in bytes."""

    weights: int
    gradients: int
    moments: int
    activations: int
    loss: int
    """A chunk of logits, the output matrix in bf16 and its gradient in fp32."""

    @property
    def total(self) -> int:
        return sum(self)


def memory(
    model: ModelConfig,
    context: int,
    rows: int,
    checkpointing: Recompute,
    device: Device,
) -> Memory:
    """Memory of a step over micro-batches of `rows` in bf16, compiled.

    A block keeps of a token its input and that of its second half, both also normed, and what
    attention gave; queries, keys and values before and after rotation; and of the feed-forward
    network both projections and their product. What is not computed again is kept of all blocks,
    the rest of one. On an H100 within 2.3 % of what was measured for tiny, small and medium.
    """
    D, M, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    qkv = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    tokens = rows * context
    half = 2 * tokens
    feed_forward, others = half * (3 * M + D), half * (4 * D + 2 * qkv)
    kept = {
        "none": L * (others + feed_forward),
        "selective": L * (others + half * D) + feed_forward,
        "full": L * half * D + others + feed_forward,
    }
    chunk = min(2 * tokens * model.vocab_size, logits_bytes(device.memory_bytes))
    return Memory(
        weights=4 * model.parameters,
        gradients=4 * model.parameters,
        moments=8 * model.parameters,
        activations=kept[checkpointing] + 4 * half * D,
        loss=chunk + 6 * model.embedding_parameters,
    )


def micro_batch(
    model: ModelConfig,
    context: int,
    device: Device,
    checkpointing: Recompute | None = None,
) -> tuple[int, Recompute]:
    """The most rows that fit on the device at once, and the least that has to be computed again.

    A seventh of a GPU is left to its context and what the allocator cannot use. On a CPU memory is
    not what limits: 4 rows. One row is always tried.
    """
    if device.kind == "cpu":
        return 4, checkpointing or "none"
    kinds = (checkpointing,) if checkpointing else get_args(Recompute)
    for kind in kinds:

        def fits(rows: int, kind: Recompute = kind) -> bool:
            return memory(model, context, rows, kind, device).total <= 0.85 * device.memory_bytes

        if rows := max(takewhile(fits, count(1)), default=0):
            return rows, kind
    return 1, kinds[-1]


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
