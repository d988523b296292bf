"""Measure how fast checkpoints are written, relative to the disk, and how long training stalls.

One process alternates between writes of the same size without hashing, which show the limit of the
disk, saves that training waits for, and saves in the background while steps continue.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from train_speed import Figures, Task, training_config, wait

from zeroflow import artifacts
from zeroflow.device import find_device
from zeroflow.estimate.memory import checkpoint_bytes
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.training import checkpoint
from zeroflow.training.host_memory import HostMemory
from zeroflow.training.loop import train_step
from zeroflow.training.retention import Retention
from zeroflow.training.saver import Saver
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.workload import Workload

log = logging.getLogger(__name__)

_BLOCK_BYTES = 2**24

WRITES = {"buffered": (0, 1), "direct": (1, 1), "direct, 4 threads": (1, 4)}
"""Ways to write a file: direct or not, and the number of threads."""


class Bench:
    """A state, its saver, and the time of its steps and saves."""

    def __init__(self, task: Task, folder: Path) -> None:
        [rows] = task.rows
        self._config, self._batches = training_config(task, rows), task.batches(rows)
        self.state: TrainState = new_state(self._config)
        self.folder, self.written = folder, list[float]()
        self.saver = Saver(
            folder,
            Retention(keep=1),
            tokenizer="none",
            on_saved=lambda path, seconds: self.written.append(seconds),
        )

    def step(self) -> None:
        train_step(self.state, self._batches[self.state.step % len(self._batches)], self._config)
        wait(self._config.workload.device)

    def save(self) -> None:
        self.saver.save(self.state)

    def save_and_wait(self) -> None:
        self.save()
        self.saver.wait()

    def seconds_of_background_save(self) -> tuple[float, list[float]]:
        """Return the stall of a save, and the seconds of each step during its write."""
        count, beside = len(self.written), list[float]()
        stall = seconds(self.save)
        while len(self.written) == count:
            beside.append(seconds(self.step))
        self.saver.wait()
        return stall, beside

    def load(self) -> None:
        path = self.folder / f"step-{self.state.step:08d}"
        checkpoint.load(self.state, path, tokenizer="none")


def measure(task: Task, folder: Path, saves: int) -> Figures:
    """Time `saves` saves of each kind into `folder`, after one that allocates the copy."""
    bench = Bench(task, folder)
    bench.step()
    first = seconds(bench.save)
    bench.saver.wait()
    size = _size(folder)
    limits: dict[str, list[float]] = {name: [] for name in WRITES}
    reading, alone, verifying, loading = ([] for _ in range(4))
    stalls, one_step, beside, writing = ([] for _ in range(4))
    for _ in range(saves):
        for name, way in WRITES.items():
            limits[name].append(seconds(partial(write, folder / "limit", size, *way)))
        reading.append(seconds(partial(read, folder / "limit")))
        (folder / "limit").unlink()
        bench.step()
        bench.save_and_wait()
        alone.append(bench.written[-1])
        verifying.append(seconds(partial(checkpoint.latest, folder)))
        loading.append(seconds(bench.load))
        one_step += [seconds(bench.step) for _ in range(3)]
        stall, during = bench.seconds_of_background_save()
        stalls.append(stall)
        beside += during
        writing.append(bench.written[-1])
        log.info("written in %.2f s, in the background in %.2f s", alone[-1], writing[-1])
    limit = min(statistics.median(each) for each in limits.values())
    return {
        "gb": size / 1e9,
        "first_seconds": first,
        "limits": limits,
        "limit": limit,
        "alone": alone,
        "of_limit": limit / statistics.median(alone),
        "reading": reading,
        "verifying": verifying,
        "loading": loading,
        "stalls": stalls,
        "writing": writing,
        "step_alone": statistics.median(one_step),
        "steps_beside": len(beside),
        "step_beside": statistics.mean(beside),
    }


def write(path: Path, size: int, direct: bool, threads: int) -> None:
    """Write a file of `size` bytes in large blocks, as dd does, and sync it to the disk."""
    memory = HostMemory(_BLOCK_BYTES)
    memory.bytes.random_()
    content = memory.bytes.numpy().data
    blocks = -(-size // _BLOCK_BYTES)
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda n: os.pwrite(file, content, n * _BLOCK_BYTES), range(blocks)))
    os.fsync(file)
    os.close(file)


def read(path: Path) -> None:
    """Read a file past the page cache, as dd does."""
    memory = HostMemory(_BLOCK_BYTES)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    while os.readv(file, [memory.bytes.numpy().data]):
        pass
    os.close(file)


def frequent(bench: Bench, *, every: int, steps: int) -> Figures:
    """Train `steps` steps without checkpoints, then with one due `every` few steps, as in a run."""
    without = seconds(lambda: [bench.step() for _ in range(steps)])
    stalls, saved = list[float](), 0
    begun = time.perf_counter()
    for number in range(1, steps + 1):
        bench.step()
        if number % every == 0:
            entered = time.perf_counter()
            saved += bench.saver.save(bench.state, promised=number == steps)
            stalls.append(time.perf_counter() - entered)
    bench.saver.wait()
    took = time.perf_counter() - begun
    return {
        "every": every,
        "steps": steps,
        "due": len(stalls),
        "saved": saved,
        "without": without,
        "with": took,
        "stalled": sum(stalls),
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="default: a GPU if there is one"
    )
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2, help="rows of a step (2)")
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind (3)")
    parser.add_argument("--every", type=int, default=10, help="steps between due saves (10)")
    parser.add_argument("--steps", type=int, default=0, help="steps with due saves (0: none)")
    parser.add_argument("--folder", type=Path, help="folder to write to (a temporary one)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = find_device(arguments.device or "auto")
    workload = Workload(
        device=device.kind,
        device_name=device.name,
        model=with_vocabulary(SIZES[arguments.size], arguments.vocab_size),
        seq_len=arguments.seq_len,
        micro_batch_rows=arguments.rows,
        accumulate=1,
        precision="bf16" if device.kind == "cuda" else "fp32",
        compile=False,
    )
    task = Task(
        size=arguments.size,
        vocab_size=arguments.vocab_size,
        workload=workload,
        rows=(arguments.rows,),
        windows=1,
        seconds=1,
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="zeroflow-bench-") as folder:
        found = measure(task, Path(folder) / "saves", arguments.saves)
        if arguments.steps:
            bench = Bench(task, Path(folder) / "due")
            found["due"] = frequent(bench, every=arguments.every, steps=arguments.steps)
    found |= {"device": device.name, "size": arguments.size, "torch": torch.__version__}
    if arguments.json:
        artifacts.write_json(arguments.json, found)
    report(found, predicted=checkpoint_bytes(workload))


def report(found: Figures, *, predicted: int) -> None:
    """Log all figures."""
    gb, median = found["gb"], statistics.median
    log.info(
        "%s on %s, %.2f GB (predicted %.2f)", found["size"], found["device"], gb, predicted / 1e9
    )
    for name, each in found["limits"].items():
        log.info("disk, %s: %.2f GB/s", name, gb / median(each))
    for name in ("alone", "reading", "verifying", "loading"):
        log.info("%s: %.2f s, %.2f GB/s", name, median(found[name]), gb / median(found[name]))
    log.info("a save reaches %.0f %% of the disk's limit", 100 * found["of_limit"])
    log.info(
        "training stalls for %.3f s (first save: %.2f s); a step takes %.3f s alone and %.3f s "
        "during the write, which takes %.2f s",
        *(median(found["stalls"]), found["first_seconds"]),
        *(found["step_alone"], found["step_beside"], median(found["writing"])),
    )
    if due := found.get("due"):
        log.info(
            "%d steps take %.2f s without checkpoints, and %.2f s with one due every %d steps: "
            "%d of %d were saved, training waited %.2f s",
            *(due["steps"], due["without"], due["with"], due["every"]),
            *(due["saved"], due["due"], due["stalled"]),
        )


if __name__ == "__main__":
    main()
