"""History of a run's processes in events.jsonl, which the launcher follows."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from zeroflow.artifacts import JsonObject
from zeroflow.records import JsonLines, Record, omitted
from zeroflow.training.failures import FailureReason
from zeroflow.training.metrics import MetricsRecord, StepRecord


class Started(Record):
    """A process starts training, from a checkpoint or from the beginning."""

    event: Literal["started"] = "started"
    time: float
    step: int
    steps: int
    """Number of steps of the whole run."""

    parts: int
    """Number of parts of the shards that the process reads; an extended run reads more."""


class Saved(Record):
    """A checkpoint is complete."""

    event: Literal["saved"] = "saved"
    time: float
    step: int
    path: str
    seconds: float | None = omitted()
    """Duration of the copy and the write; None in files of older versions."""


class CheckpointSkipped(Record):
    """A checkpoint was skipped, because the one before was still being written."""

    event: Literal["checkpoint-skipped", "thinned"] = "checkpoint-skipped"
    """thinned in files of older versions."""

    time: float
    step: int


class Skipped(Record):
    """The update of a logged step was skipped because its loss or gradient was non-finite."""

    event: Literal["skipped"] = "skipped"
    time: float
    step: int
    skipped: int
    """Updates skipped so far."""


class Spike(Record):
    """A logged step is unusual."""

    event: Literal["spike"] = "spike"
    time: float
    step: int
    alarms: list[str]


class Metrics(Record):
    """A record was added to metrics.jsonl. In the file, its fields are next to `event`."""

    FORMAT: ClassVar[int] = StepRecord.FORMAT
    """Format of the records."""

    event: Literal["metrics"] = "metrics"
    record: MetricsRecord

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def time(self) -> float:
        return self.record.time

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and "record" not in content:
            return {"record": content}
        return content

    @model_serializer
    def _flat(self) -> JsonObject:
        return {"event": self.event} | self.record.model_dump(mode="json")


class Stopped(Record):
    """A process stopped cleanly on request."""

    event: Literal["stopped"] = "stopped"
    time: float | None = omitted()
    step: int | None = omitted()
    message: str


class Failed(Record):
    """A process ended with an error."""

    event: Literal["failed"] = "failed"
    message: str
    reason: FailureReason
    rank: int = 0
    step: int | None = None
    """Step at which training diverged."""


class Done(Record):
    """A process finished its work."""

    event: Literal["done"] = "done"
    time: float | None = omitted()
    step: int | None = omitted()


Event = Annotated[
    Started | Metrics | Saved | CheckpointSkipped | Skipped | Spike | Stopped | Failed | Done,
    Field(discriminator="event"),
]

EVENTS: JsonLines[Event] = JsonLines(Event)
"""events.jsonl."""
