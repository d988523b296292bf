"""Time to write a checkpoint, from earlier runs or a measurement now."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from zeroflow.device import existing_parent
from zeroflow.estimate.history import NEWEST, Past
from zeroflow.training import chunked_files
from zeroflow.training.host_memory import HostMemory
from zeroflow.units import count, decimal

_NEAR = 3.0
"""Maximum ratio of the sizes of two checkpoints for which the same bytes per second are assumed.
Small files are limited by the latency of the disk."""

_SMALLEST = 10**8
"""Bytes of a checkpoint that are worth a measurement; smaller ones take less than a second."""

_SAMPLE_BYTES = 2**26


class DiskSpeed(NamedTuple):
    """Speed at which checkpoints are written."""

    bytes_per_second: float | None
    """None if unknown."""

    source: str


def disk_speed(folder: Path, checkpoint_bytes: int, runs: Sequence[Past]) -> DiskSpeed:
    """Return the speed at which checkpoints are written to the disk of `folder`.

    Args:
        folder: the cache, which need not exist yet.
        runs: all earlier runs in the cache.
    """
    seconds_per_byte = []
    for past in runs:
        size, seconds = past.measured.checkpoint_bytes, past.measured.checkpoint_seconds
        if size and seconds and 1 / _NEAR <= size / checkpoint_bytes <= _NEAR:
            seconds_per_byte.append(seconds / size)
    if newest := seconds_per_byte[-NEWEST:]:
        source = f"as in {count(len(newest), 'earlier run')} here"
        return DiskSpeed(1 / statistics.median(newest), source)
    if checkpoint_bytes < _SMALLEST:
        return DiskSpeed(
            None, f"the disk's speed is not measured for less than {decimal(_SMALLEST)}"
        )
    try:
        rate = _measured(existing_parent(folder))
    except OSError as error:
        return DiskSpeed(None, f"the disk's speed is unknown: {error.strerror}")
    return DiskSpeed(rate, f"measured now with {decimal(_SAMPLE_BYTES)}")


@cache
def _measured(folder: Path) -> float:
    """Write a temporary file into `folder`, as checkpoints are written; return bytes per second."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".zeroflow-") as temporary:
        sample = _Sample()
        started = time.perf_counter()
        chunked_files.write(Path(temporary), {"sample": sample})
        return sample.size / (time.perf_counter() - started)


class _Sample:
    """Content that cannot be compressed."""

    size = _SAMPLE_BYTES

    def __init__(self) -> None:
        self._memory = HostMemory(chunked_files.CHUNK_BYTES)
        self._memory.bytes.random_()

    def read(self, begin: int, end: int) -> memoryview:
        return self._memory.bytes[: end - begin].numpy().data
