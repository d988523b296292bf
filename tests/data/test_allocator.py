"""Memory that the C library keeps, measured in a separate process."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in other ways"
)

HELD = """
import ctypes
from pathlib import Path
from zeroflow.data import allocator

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

before = megabytes()
blocks = [libc.malloc(65_536) for _ in range(2_000)]  # too small to be mapped one by one
for block in blocks:
    ctypes.memset(block, 1, 65_536)
for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
    libc.free(block)
freed = megabytes()
allocator.give_back()
print(freed - before, megabytes() - before)
"""


def test_freed_memory_is_returned_to_the_system():
    kept, left = map(float, printed(HELD).split())
    assert kept > 100, "131 MB were freed, and stayed"
    assert left < 20


ARENAS = """
import ctypes, sys, tempfile, threading
from zeroflow.data import allocator

if sys.argv[1:]:
    allocator.share_arenas(int(sys.argv[1]))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
barrier = threading.Barrier(8)

def allocate():
    barrier.wait()  # all threads live at once
    libc.malloc(1000)
    barrier.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.NamedTemporaryFile("r") as file:
    libc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count("<heap nr="))
"""


def test_threads_share_the_requested_number_of_arenas():
    assert int(printed(ARENAS)) > 2, "by default each thread has one of its own"
    assert int(printed(ARENAS, "2")) == 2


def printed(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
