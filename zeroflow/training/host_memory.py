"""Host memory from which files are written without another copy."""

import mmap
import weakref

import torch


class HostMemory:
    """Zeroed memory that begins at a page, as direct writes to a disk need it."""

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        """
        Args:
            size: number of bytes.
            pinned: a GPU copies into the memory at full speed, without stalling the host.
        """
        self._mapped = mmap.mmap(-1, max(size, 1))
        self.bytes = torch.frombuffer(self._mapped, dtype=torch.uint8)[:size]
        """(size,) uint8. Keep the HostMemory as long as this tensor, or a view of it, is in use."""

        if not pinned:
            return
        # PyTorch's own pinned memory is rounded up to a power of two, and its pages are mapped by
        # one thread, which takes three times as long
        self.bytes.zero_()
        runtime = torch.cuda.cudart()
        address = self.bytes.data_ptr()
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, size, 0)))
        weakref.finalize(self, runtime.cudaHostUnregister, address)
