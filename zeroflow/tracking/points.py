"""Points of a run's curves, which every tracker receives."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

Axis = Literal["steps", "tokens", "gflops"]
"""Unit of the x axis of a curve."""


class Point(NamedTuple):
    """A point of a curve."""

    key: str
    value: float
    step: int
    """Position on the x axis."""

    time: float
    """Seconds since the epoch."""

    axis: Axis = "steps"
    label: str = ""
    """Meaning of the value, with its unit."""


class NewPoints(NamedTuple):
    """Points that were added since the last look at a run."""

    points: Iterable[Point]
    from_start: bool
    """True if these are all points of the run: of a first look, or because the run was resumed and
    steps after its checkpoint were dropped."""


Look = Callable[[], NewPoints]
"""Returns the points that were added since its last call."""
