"""TODO docstring."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Line = dict[str, Any]
"""Of metrics.jsonl."""


class Point(NamedTuple):
    key: str
    value: float
    step: int
    time: float


# Curves and the fields of metrics.jsonl that they draw
_BY_STEP = {
    "loss/train": "loss",
    "loss/val": "val_loss",
    "loss/val_bpb": "val_bpb",
    "optim/learning_rate": "lr",
    "optim/grad_norm": "grad_norm",
    "optim/update_ratio": "update_ratio",
    "optim/skipped_updates": "skipped_updates",
    "perf/tokens_per_second": "tokens_per_second",
    "perf/mfu": "mfu",
    "perf/peak_memory_mib": "peak_memory_mib",
}


_BY_TOKENS = {"loss/train_by_tokens": "loss", "loss/val_by_tokens": "val_loss"}


_BY_GFLOPS = {"loss/train_by_gflops": "loss", "loss/val_by_gflops": "val_loss"}


def points(lines: Iterable[Line]) -> Iterator[Point]:
    """What MLflow shows of `lines`, in their order; a figure that is None or absent is no point."""
    for line in lines:
        axes = [(line["step"], _BY_STEP), (line["tokens"], _BY_TOKENS)]
        if "flops" in line:  # in units of which MLflow's 64 bits hold enough
            axes.append((line["flops"] // 10**9, _BY_GFLOPS))
        for x, curves in axes:
            for key, field in curves.items():
                if (value := line.get(field)) is not None:
                    yield Point(key, value, x, line["time"])
        for phase, share in line.get("goodput", {}).items():
            yield Point(f"time/{phase}", share, line["step"], line["time"])
