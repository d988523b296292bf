"""Environment variables of the ranks: place, allocator, caches of compiled code, launch time.

PyTorch is not imported, so that a command can start ranks before its own imports.
"""

import os
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import NamedTuple

LAUNCHED = "ZEROFLOW_LAUNCHED"
"""Environment variable with the launch time, at which the start-up of a rank begins."""

CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Environment variable, and the value with which cuBLAS is deterministic. It is read at the first
call of cuBLAS. On Hopper, this is PyTorch's default."""


class Place(NamedTuple):
    """The place of a rank's process: it can work on every job that has a rank there."""

    rank: int
    ranks: int
    compile_cache: Path | None
    """Folder for compiled code, unless the environment names one; None for PyTorch's default."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the process."""
        return rank_environment(self.compile_cache) | place_environment(self.rank, self.ranks)


def rank_environment(compile_cache: Path | None) -> dict[str, str]:
    """Return the environment that all ranks share. Variables that the user has set take precedence.

    Args:
        compile_cache: folder for compiled code; None for PyTorch's default.
    """
    # glibc returns every large tensor to the kernel when it is freed, and the kernel maps the next
    # one page by page. This takes a fifth of a step on a CPU, and less with huge pages
    defaults = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        **dict([CUBLAS_WORKSPACE]),  # a process may work on a deterministic job after others
    }
    user = dict(os.environ)
    if compile_cache is not None:
        # By default, PyTorch and the kernels use temporary folders, which a reboot may delete
        names = {
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TRITON_CACHE_DIR": "triton",
            "QUACK_CACHE_DIR": "quack",
            "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash-attention",
        }
        defaults |= {name: str(compile_cache / folder) for name, folder in names.items()}
        defaults["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
        if not _has_bytecode("torch"):
            # A container image may contain no bytecode and forbid writing it. Then every rank would
            # compile PyTorch's Python sources whenever it starts
            user.pop("PYTHONDONTWRITEBYTECODE", None)
            defaults["PYTHONPYCACHEPREFIX"] = str(compile_cache / "python")
    return defaults | user | {"PYTHONUNBUFFERED": "1"}


def _has_bytecode(package: str) -> bool:
    found = find_spec(package)
    assert found is not None and found.origin is not None
    return Path(cache_from_source(found.origin)).exists()


def place_environment(rank: int, ranks: int) -> dict[str, str]:
    """Return the environment variables of the process that is `rank` of `ranks`."""
    if ranks == 1:  # replaces variables that a launcher such as Slurm may have set for the flow
        return {"RANK": "0", "WORLD_SIZE": "1"}
    # Each rank sees only its own GPU, so that code can use the default device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks))))
    devices = [number.strip() for number in visible.split(",")]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "CUDA_VISIBLE_DEVICES": devices[rank] if rank < len(devices) else "",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // ranks))),
    }


def _cores() -> int:
    """Return what `device.cores` does, whose module imports PyTorch."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
