import json

import pytest
from logged import step_record, validation_record

from zeroflow.training.events import (
    EVENTS,
    CheckpointSkipped,
    Done,
    Event,
    Failed,
    Metrics,
    Saved,
    Skipped,
    Spike,
    Started,
    Stopped,
)

OLD = [
    '{"event": "done"}',
    '{"event": "started", "time": 1796053490.8525178, "step": 0, "steps": 60, "parts": 1}',
    '{"event": "metrics", "time": 1796053491.15, "step": 0, "tokens": 0, "flops": 0, '
    '"val_loss": 6.916815385222435, "val_bpb": null, "sample": "def msg"}',
    '{"event": "metrics", "time": 1796053491.184216, "step": 1, "tokens": 512, "flops": 453967872, '
    '"loss": 6.94, "lr": 0.0001, "grad_norm": 0.75, "update_ratio": 0.0169, "skipped_updates": 0, '
    '"first_epoch": true, "tokens_per_second": null, "peak_memory_mib": 418.5, '
    '"goodput": {"start": 1.0}}',
    '{"event": "spike", "time": 1796053543.6, "step": 1325, "alarms": ["gradient norm 7.32"]}',
    '{"event": "saved", "time": 1796053523.9, "step": 200, "path": "/c/checkpoints/step-00000200"}',
    '{"event": "failed", "message": "CUDA out of memory", "reason": "out of memory", "rank": 1, '
    '"step": null}',
    '{"event": "stopped", "message": "the pre-flight was stopped"}',
    '{"event": "thinned", "time": 1796053524.2, "step": 300}',
]
"""Lines that versions without a format wrote."""


@pytest.mark.parametrize("line", OLD)
def test_line_of_an_older_version_is_read_and_written_with_the_same_fields(line, tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(line + "\n")
    [event] = EVENTS.read(path)
    EVENTS.append(path, event)
    before, again = (json.loads(text) for text in path.read_text().splitlines())
    assert again == {"format": 1} | before


@pytest.mark.parametrize(
    "event",
    [
        Started(time=1.0, step=0, steps=9, parts=2),
        Metrics(record=step_record(3, 4.5)),
        Metrics(record=validation_record(3, 4.5)),
        Saved(time=1.0, step=3, path="step-00000003", seconds=0.5),
        CheckpointSkipped(time=1.0, step=4),
        Skipped(time=1.0, step=3, skipped=2),
        Spike(time=1.0, step=3, alarms=["loss 9"]),
        Stopped(message="asked to"),
        Failed(message="no", reason="diverged", rank=1, step=4),
        Done(time=2.0, step=9),
    ],
    ids=lambda event: event.event,
)
def test_event_is_read_as_it_was_written(event: Event, tmp_path):
    path = tmp_path / "events.jsonl"
    EVENTS.append(path, event)
    assert EVENTS.read(path) == [event]


def test_record_of_an_event_is_stored_flat_next_to_its_name(tmp_path):
    path = tmp_path / "events.jsonl"
    record = step_record(3, 4.5)
    event = Metrics(record=record)
    EVENTS.append(path, event)
    assert json.loads(path.read_text()) == {"event": "metrics"} | record.as_json()
    assert (event.step, event.time) == (3, 3.0)
