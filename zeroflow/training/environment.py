"""Environment variables of the ranks: allocator, caches of compiled code, launch time."""

import os
from importlib.util import cache_from_source
from pathlib import Path
from typing import NamedTuple

import torch

from zeroflow.training import zero

LAUNCHED = "ZEROFLOW_LAUNCHED"
"""Environment variable with the launch time, at which the start-up of a rank begins."""


class Place(NamedTuple):
    """The place of a rank's process: it can work on every job that has a rank there."""

    rank: int
    ranks: int
    compile_cache: Path | None
    """Folder for compiled code, unless the environment names one; None for PyTorch's default."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the process."""
        return rank_environment(self.compile_cache) | zero.environment(self.rank, self.ranks)


def rank_environment(compile_cache: Path | None) -> dict[str, str]:
    """Return the environment that all ranks share. Variables that the user has set take precedence.

    Args:
        compile_cache: folder for compiled code; None for PyTorch's default.
    """
    # glibc returns every large tensor to the kernel when it is freed, and the kernel maps the next
    # one page by page. This takes a fifth of a step on a CPU, and less with huge pages
    defaults = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        # PyTorch reads it once. A process may work on deterministic jobs, which need it, after
        # others; on Hopper, this is PyTorch's default
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
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
        if not Path(cache_from_source(torch.__file__)).exists():
            # A container image may contain no bytecode and forbid writing it. Then every rank would
            # compile PyTorch's Python sources whenever it starts
            user.pop("PYTHONDONTWRITEBYTECODE", None)
            defaults["PYTHONPYCACHEPREFIX"] = str(compile_cache / "python")
    return defaults | user | {"PYTHONUNBUFFERED": "1"}
