"""The GPU of a rank, opened before its first job, because CUDA takes a second to open it."""

import ctypes
import logging
import os
from threading import Thread, Timer

import torch

from zeroflow.device import memory_in_use

log = logging.getLogger(__name__)

_MOST_USED = 0.1
"""Share of the GPU's memory in use, above which another program is assumed to work on it."""

_WAIT_SECONDS = 60.0
"""Maximum time for which the GPU is open without a job. The shards of the run may take hours, or
another run may have the GPU."""

_SIZE = 256
"""Rows and columns of the first matrix product."""


class EarlyGpu:
    """Opens the GPU ahead of the first job, unless another program uses it."""

    def __init__(self, seconds: float = _WAIT_SECONDS) -> None:
        """
        Args:
            seconds: time after which this process ends if it has opened the GPU and has no job. The
                next job gets a new process.
        """
        self._end = Timer(seconds, os._exit, [1])
        self._end.daemon = True
        self._opening = Thread(target=self._open, daemon=True)

    def open(self) -> None:
        """Begin to open the GPU, in a thread. Only the first call has an effect."""
        if self._opening.ident is None:
            self._opening.start()

    def keep(self) -> None:
        """Keep the GPU, because a job begins."""
        self._end.cancel()
        if self._opening.ident is not None:
            self._opening.join()

    def _open(self) -> None:
        try:
            if memory_in_use() > _MOST_USED:
                return
            self._end.start()
            _open_context()
            matrix = torch.zeros(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16)
            (matrix @ matrix).sum().item()  # opens cuBLAS
        except Exception as error:  # the job will fail in the same way, and report it
            log.debug("the GPU was not opened ahead of the first job: %s", error)


def _open_context() -> None:
    """Open the CUDA context that PyTorch will use.

    PyTorch would do it in the same way, but other threads could not import meanwhile.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    cuda.cuInit(0)
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
