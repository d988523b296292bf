"""The device of a run, determined without opening a CUDA context."""

import os
import platform
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from zeroflow.config import Config
from zeroflow.units import count


class _Gpu(NamedTuple):
    peak_flops: float
    """FLOP/s of bf16 matrix products, without sparsity."""

    gigabytes: int
    """Advertised memory in GB; NVML reports up to 5 % less if error correction uses some of it."""

    capability: tuple[int, int]


# From the vendor's data sheets. Names are the full names in NVML, because variants of a chip differ
_GPUS = {
    "NVIDIA H200": _Gpu(989e12, 141, (9, 0)),
    "NVIDIA H100 80GB HBM3": _Gpu(989e12, 80, (9, 0)),
    "NVIDIA H100 NVL": _Gpu(835e12, 94, (9, 0)),
    "NVIDIA H100 PCIe": _Gpu(756e12, 80, (9, 0)),
    "NVIDIA A100-SXM4-80GB": _Gpu(312e12, 80, (8, 0)),
    "NVIDIA A100-SXM4-40GB": _Gpu(312e12, 40, (8, 0)),
    "NVIDIA A100 80GB PCIe": _Gpu(312e12, 80, (8, 0)),
    "NVIDIA A100-PCIE-40GB": _Gpu(312e12, 40, (8, 0)),
    "NVIDIA L40S": _Gpu(362e12, 48, (8, 9)),
    "NVIDIA L4": _Gpu(121e12, 24, (8, 9)),
    "NVIDIA GeForce RTX 4090": _Gpu(165e12, 24, (8, 9)),
    "NVIDIA GeForce RTX 3090": _Gpu(71e12, 24, (8, 6)),
}

_MOST_GIGABYTES = 1e6
"""Above the memory of any GPU; a larger number is a mistake, such as one in bytes."""

DeviceKind = Literal["cpu", "cuda"]

Precision = Literal["bf16", "fp32"]

BF16_CAPABILITY = (8, 0)
"""Compute capability of Ampere."""

_TRITON_CAPABILITY = (7, 0)
"""Compute capability of Volta."""

FP8_CAPABILITY = (8, 9)
"""Compute capability of Ada; Hopper has (9, 0)."""

ASSUMED_CAPABILITY = (9, 0)
"""Compute capability that is assumed for an unknown GPU, so that no precision is refused."""


class Device(Config):
    """Device of a run."""

    kind: DeviceKind
    name: str
    memory_bytes: int
    peak_flops: float | None = None
    """Dense bf16 FLOP/s; None if not known for certain."""

    capability: tuple[int, int] | None = None
    """CUDA's compute capability; None for a CPU."""

    @property
    def has_bf16(self) -> bool:
        """True if matrix products are faster in bf16 than in fp32."""
        return self.capability is not None and self.capability >= BF16_CAPABILITY

    @property
    def compiles(self) -> bool:
        """True if torch.compile, which uses Triton, supports the device."""
        return self.capability is not None and self.capability >= _TRITON_CAPABILITY


class Load(Config):
    """Load of this machine by other programs."""

    average: float
    """Load average of the last minute: programs that run or wait for a core."""

    cores: int

    @property
    def share(self) -> float:
        """Expected fraction of the cores for one more program that has a thread for each core."""
        return self.cores / (self.cores + self.average)

    def __str__(self) -> str:
        return f"load average now {self.average:.1f} on {count(self.cores, 'core')}"


def find_load() -> Load:
    return Load(average=os.getloadavg()[0], cores=torch.get_num_threads())


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux, where taskset or Slurm may allow only some
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_count() -> int:
    """Return the number of GPUs that PyTorch sees, using only NVML and CUDA_VISIBLE_DEVICES."""
    return torch.cuda.device_count()


def find_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """Return the device to train on, without opening a CUDA context in this process.

    Raises:
        ValueError: `wanted` is a GPU, but PyTorch sees none.
    """
    if wanted == "cuda" and not gpu_count():
        build = torch.version.cuda or "none: this PyTorch is built for CPUs"
        raise ValueError(f"--device cuda, but PyTorch sees no GPU (CUDA of PyTorch: {build})")
    if wanted == "cpu" or not gpu_count():
        name = f"{platform.machine()} CPU, {count(torch.get_num_threads(), 'thread')}"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(kind="cpu", name=name, memory_bytes=memory)
    return _first_gpu()


def _first_gpu() -> Device:
    import pynvml  # needed only with a GPU

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    handle = (
        pynvml.nvmlDeviceGetHandleByIndex(int(first))
        if first.isdigit()
        else pynvml.nvmlDeviceGetHandleByUUID(first)
    )
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    return Device(
        kind="cuda",
        name=name,
        memory_bytes=memory,
        peak_flops=_peak_flops(name),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


def _peak_flops(name: str) -> float | None:
    return _GPUS[name].peak_flops if name in _GPUS else None


def gpus_named(wanted: str) -> list[str]:
    """Return the known GPUs whose names are or contain `wanted`, the most common one first."""
    found = [name for name in _GPUS if wanted.casefold() in name.casefold()]
    whole = [name for name in found if f" {name}".casefold().endswith(f" {wanted.casefold()}")]
    return whole or found  # so that L4 does not match L40S


def known_gpu(wanted: str, memory_gb: float | None = None) -> Device:
    """Return the most common GPU with this name, or an unknown GPU with `memory_gb`.

    Raises:
        ValueError: the GPU is not known, and its memory is not given; or it has no memory.
    """
    if memory_gb is not None and not 0 < memory_gb < _MOST_GIGABYTES:
        raise ValueError(f"--memory-gb {memory_gb:g}: give the memory of the GPU in GB, as in 48")
    memory = None if memory_gb is None else int(memory_gb * 2**30)
    if found := gpus_named(wanted):
        gpu = _GPUS[found[0]]
        return Device(
            kind="cuda",
            name=found[0],
            memory_bytes=memory or gpu.gigabytes * 2**30,
            peak_flops=gpu.peak_flops,
            capability=gpu.capability,
        )
    if memory is None:
        raise ValueError(
            f"--gpu {wanted} is not one of: {', '.join(_GPUS)}. For another GPU, give its memory "
            "too, as in --memory-gb 48"
        )
    return Device(kind="cuda", name=wanted, memory_bytes=memory, capability=ASSUMED_CAPABILITY)


def gpu_elsewhere(name: str) -> Device:
    """Return a GPU of any machine; if it is not in our list, only its name is known."""
    return known_gpu(name) if name in _GPUS else Device(kind="cuda", name=name, memory_bytes=0)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """Return `folder`, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
