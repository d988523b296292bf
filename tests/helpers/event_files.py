"""Reading TensorBoard's event files back, with TensorBoard's own reader."""

from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]
"""Step and value of every point, in the order of the file."""


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps all points. Without purging, a step that is there twice is seen twice
    found = EventAccumulator(str(folder), {"tensors": 0}, purge_orphaned_data=False)
    return found.Reload()


def curves(folder: Path) -> dict[str, Curve]:
    """The curves of a run, by key."""
    from tensorboard.util.tensor_util import make_ndarray

    found = accumulated(folder)
    return {
        key: [(event.step, make_ndarray(event.tensor_proto).item()) for event in found.Tensors(key)]
        for key in found.Tags()["tensors"]
    }
