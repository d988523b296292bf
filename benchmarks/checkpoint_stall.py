"""Measure how long a checkpoint stalls training, written in the background or synchronously.

One process saves the same state alternately in both ways. It also times steps that run during a
background write.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from train_speed import Figures, Task, training_config, wait

from zeroflow.device import find_device
from zeroflow.estimate.memory import checkpoint_bytes
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.training.checkpoint import Retention, Saver
from zeroflow.training.loop import train_step
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.workload import Workload

log = logging.getLogger(__name__)


def measure(task: Task, folder: Path, saves: int) -> Figures:
    """Time `saves` saves of each kind into `folder`, after one that allocates the copy."""
    [rows] = task.rows
    config = training_config(task, rows)
    state = new_state(config)
    batches = task.batches(rows)

    def step() -> None:
        train_step(state, batches[state.step % len(batches)], config)
        wait(task.workload.device)

    written: list[float] = []
    saver = Saver(
        folder,
        Retention(keep=1),
        tokenizer="none",
        on_saved=lambda path: written.append(time.perf_counter()),
    )
    step()
    first = seconds(lambda: saver.save(state))
    saver.wait()
    stalls, waited_for, alone, beside, writing = [], [], [], [], []
    for _ in range(saves):
        step()
        waited_for.append(seconds(lambda: _save_and_wait(saver, state)))
        alone += [seconds(step) for _ in range(3)]
        begun, count = time.perf_counter(), len(written)
        stalls.append(seconds(lambda: saver.save(state)))
        while len(written) == count:
            beside.append(seconds(step))
        writing.append(written[-1] - begun)
        saver.wait()
        log.info("synchronous: %.2f s, in the background: %.3f s", waited_for[-1], stalls[-1])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "gb": size / 1e9,
        "first_seconds": first,
        "waited_for": waited_for,
        "stalls": stalls,
        "stall_share": statistics.median(stalls) / statistics.median(waited_for),
        "writing": writing,
        "step_alone": statistics.median(alone),
        "steps_beside": len(beside),
        "step_beside": statistics.mean(beside),
    }


def _save_and_wait(saver: Saver, state: TrainState) -> None:
    saver.save(state)
    saver.wait()


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="default: a GPU if there is one"
    )
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2, help="rows of a step (2)")
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind (3)")
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
        found = measure(task, Path(folder), arguments.saves)
    found |= {"device": device.name, "size": arguments.size, "torch": torch.__version__}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    log.info(
        "%s on %s, %.2f GB (predicted %.2f): training stalls for %.3f s (first save: %.2f s), "
        "compared with %.2f s for a synchronous save: %.1f %%",
        *(arguments.size, device.name, found["gb"], checkpoint_bytes(workload) / 1e9),
        *(statistics.median(found["stalls"]), found["first_seconds"]),
        *(statistics.median(found["waited_for"]), 100 * found["stall_share"]),
    )
    log.info(
        "a step takes %.3f s alone and %.3f s during the write, which takes %.1f s",
        *(found["step_alone"], found["step_beside"], statistics.median(found["writing"])),
    )


if __name__ == "__main__":
    main()
