"""Environment variables of the ranks: allocator, caches of compiled code, time of the launch."""

import os
import time
from importlib.util import cache_from_source
from pathlib import Path

import torch

LAUNCHED = "ZEROFLOW_LAUNCHED"
"""Environment variable with the time of the launch, from which a rank counts its start-up."""


def rank_environment(compile_cache: Path | None) -> dict[str, str]:
    """Return the environment that all ranks share. Variables that the user has set take precedence.

    Args:
        compile_cache: folder for compiled code; None leaves that to PyTorch.
    """
    # glibc returns every large tensor to the kernel when it is freed, and the kernel maps the
    # next one page by page, which takes a fifth of a step on a CPU. With huge pages it is less
    defaults = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    user = dict(os.environ)
    if compile_cache is not None:
        # By default PyTorch uses a temporary folder, which may be gone after a reboot
        names = {
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TRITON_CACHE_DIR": "triton",
            "QUACK_CACHE_DIR": "quack",
            "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash-attention",
        }
        defaults |= {name: str(compile_cache / folder) for name, folder in names.items()}
        defaults["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
        if not Path(cache_from_source(torch.__file__)).exists():
            # A container image may contain no bytecode and forbid writing any. Then every rank
            # would compile PyTorch's sources at its start
            user.pop("PYTHONDONTWRITEBYTECODE", None)
            defaults["PYTHONPYCACHEPREFIX"] = str(compile_cache / "python")
    return defaults | user | {"PYTHONUNBUFFERED": "1", LAUNCHED: str(time.time())}
