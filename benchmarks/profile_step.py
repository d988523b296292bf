"""Show the time of a training step by family of kernels, and the longest kernels.

Times are those of kernels on a GPU, and on a CPU those of PyTorch's operations without the
operations that they call.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from train_speed import (
    Figures,
    Step,
    Task,
    add_shape,
    asked_task,
    check,
    ours,
    parse_contender,
    peak_bytes,
    settle_shape,
    wait,
)

from zeroflow.device import Device
from zeroflow.model.sizes import SIZES

# The first match counts. Inductor names a fused kernel after everything in it, even the cast to fp8
# or the attention that it only prepares, so its kernels are matched first
FAMILIES = (
    ("cross-entropy", r"cross_entropy|log_?softmax|nll_?loss|logsumexp|aten::(amax|exp_|log)$"),
    ("optimiser", r"adam|multi_tensor|lpnorm|foreach|optimizer"),
    ("embedding", r"embedding|index_put|indexing_backward|index_?select|compute_grad_weight"),
    ("norms, pointwise", r"(triton|cpp)_(poi|per|red|for|fused)"),
    ("attention", r"attention|flash|fmha|sdpa|flex|softmax"),
    ("GEMM in fp8", r"e4m3|e5m2|fp8|f8f8|nvjet_q|scaled_mm"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|triton_tem|mkldnn|linear|::(add|b)?mm$"),
    ("copies", r"memcpy|memset|catarray|aten::(copy_|_to_copy|fill_|zero_|cat)$"),
    ("norms, pointwise", r"norm|elementwise|reduce|aten::"),
)


class Kernel(NamedTuple):
    name: str
    start: float
    """Start in microseconds; 0 for an operation on a CPU, whose start is not recorded."""

    duration: float
    count: int = 1


def family(name: str) -> str:
    found = (key for key, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def profile_steps(step: Step, task: Task, steps: int) -> tuple[list[Kernel], float]:
    """Profile `steps` steps: their kernels, and the microseconds from the first to the last."""
    device, batches = task.workload.device, task.batches(task.rows[0])
    for number in range(3):
        step(batches[number])
    wait(device)
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    started = time.perf_counter()
    with profile(activities=activities) as trace:
        for number in range(steps):
            step(batches[number % len(batches)])
        wait(device)
        elapsed = time.perf_counter() - started
    if device == "cpu":
        operations = [
            Kernel(item.key, 0, item.self_cpu_time_total, item.count)
            for item in trace.key_averages()
        ]
        return operations, elapsed * 1e6
    kernels = list(_gpu_kernels(trace))
    first, last = min(x.start for x in kernels), max(x.start + x.duration for x in kernels)
    return kernels, last - first


def _gpu_kernels(trace: profile) -> Iterator[Kernel]:
    """Kernels of the exported trace, where they differ from annotations on the GPU's timeline."""
    with tempfile.TemporaryDirectory(prefix="zeroflow-bench-") as folder:
        file = Path(folder, "trace.json")
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield Kernel(event["name"], event["ts"], event["dur"])


def busy(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, end = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.start + kernel.duration - max(end, kernel.start))
        end = max(end, kernel.start + kernel.duration)
    return total


def summarise(kernels: list[Kernel], span: float, steps: int, top: int) -> Figures:
    """Milliseconds per step by family and by kernel, longest first."""
    families: dict[str, float] = {}
    names: dict[str, list[float]] = {}
    for kernel in kernels:
        ms = kernel.duration / steps / 1e3
        families[family(kernel.name)] = families.get(family(kernel.name), 0.0) + ms
        entry = names.setdefault(kernel.name, [0.0, 0.0])
        entry[0] += ms
        entry[1] += kernel.count / steps
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:top]
    on_gpu = any(kernel.start for kernel in kernels)
    return {
        "span_ms": span / steps / 1e3,
        "busy_ms": busy(kernels) / steps / 1e3 if on_gpu else sum(families.values()),
        "families": dict(sorted(families.items(), key=lambda item: -item[1])),
        "longest": [{"name": name, "ms": ms, "calls": calls} for name, (ms, calls) in longest],
    }


def report(figures: dict[str, Any], device: Device, task: Task) -> str:
    """The tables in Markdown."""
    total = sum(figures["families"].values())
    work = task.workload
    lines = [
        f"{device.name}, torch {torch.__version__}, {task.size}, {work.arithmetic}, "
        f"{'compiled' if work.compile else 'not compiled'}: {work.batch_rows} rows of "
        f"{work.seq_len:,} per step in micro-batches of {task.rows[0]}; "
        f"vocabulary {task.vocab_size:,}",
        "",
        f"per step: busy {figures['busy_ms']:.2f} ms of {figures['span_ms']:.2f} ms; "
        f"peak {figures['peak_gb']:.1f} GB",
        "",
        "| family | ms | share % |",
        "| --- | ---: | ---: |",
    ]
    for name, ms in figures["families"].items():
        lines.append(f"| {name} | {ms:.2f} | {100 * ms / total:.1f} |")
    lines += ["", "| longest | ms | calls | family |", "| --- | ---: | ---: | --- |"]
    for kernel in figures["longest"]:
        name = kernel["name"].replace("|", "/")[:90]
        lines.append(
            f"| `{name}` | {kernel['ms']:.2f} | {kernel['calls']:.0f} | {family(kernel['name'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    add_shape(parser)
    parser.add_argument("--batch-rows", type=int, help="rows of a step (one micro-batch)")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch (12; 4 on a CPU)")
    parser.add_argument("--ours", default="ours", help="settings, such as ours:compile=false")
    parser.add_argument("--fp8", action="store_true", help="matrix products in fp8")
    parser.add_argument("--steps", type=int, default=3, help="steps to profile (3)")
    parser.add_argument("--top", type=int, default=20, help="kernels to list by name (20)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    device = settle_shape(arguments)
    rows = arguments.rows or (12 if device.kind == "cuda" else 4)
    arguments.rows, arguments.batch_rows = [rows], arguments.batch_rows or rows
    arguments.windows = arguments.seconds = 1  # not used here
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: use 1 or more")
    try:
        name, settings = parse_contender(arguments.ours)
        if name != "ours":
            parser.error(f"--ours {name}: only ours is profiled")
        if arguments.fp8:
            settings["fp8"] = "true"
        task = asked_task(arguments, arguments.size, settings)
        check(task, device)
    except ValueError as error:
        parser.error(str(error))
    if device.kind == "cpu":
        torch._inductor.config.cpp.enable_kernel_profile = True  # names for compiled kernels
    kernels, span = profile_steps(ours(task, rows), task, arguments.steps)
    figures = summarise(kernels, span, arguments.steps, arguments.top)
    figures["peak_gb"] = peak_bytes(task.workload.device) / 1e9
    if arguments.json:
        facts = {"device": device.model_dump(), "workload": task.workload.model_dump()} | figures
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(report(figures, device, task))


if __name__ == "__main__":
    main()
