"""TensorBoard's event file of a run, read back by TensorBoard."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from logged import step_record, validation_record
from patience import wait_until

from zeroflow.run_folder import RunFolder
from zeroflow.tracking import others
from zeroflow.tracking.config import TrackingConfig
from zeroflow.tracking.tensorboard_files import EventFile, event_files
from zeroflow.training.metrics import METRICS, MetricsRecord, follow_points, points

pytest.importorskip("tensorboard")
from event_files import accumulated, curves


@pytest.fixture
def ours(config: TrackingConfig) -> TrackingConfig:
    return config.replace(log_to=("tensorboard",))


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="zeroflow.tracking"):
        yield caplog


def add(folder: RunFolder, *records: MetricsRecord) -> None:
    for record in records:
        METRICS.append(folder.metrics, record)


def finish(config: TrackingConfig, folder: RunFolder) -> None:
    others.finish(config, folder, [*points(METRICS.read(folder.metrics))])


def expected(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for point in points(METRICS.read(folder.metrics)):
        found.setdefault(point.key, []).append((point.step, pytest.approx(point.value, rel=1e-6)))
    return found  # TensorBoard keeps 32 bits of a value


def content(folder: RunFolder) -> bytes:
    return event_files(folder.path)[-1].read_bytes()


def test_run_that_was_killed_and_resumed_has_every_step_once(ours, mine):
    add(mine, validation_record(0, 6.0), *(step_record(step, 5.0) for step in (1, 2)))
    [delivery] = others.follow(ours, mine, partial(follow_points, mine.metrics))
    wait_until(lambda: event_files(mine.path) and "loss/train" in curves(mine.path))
    add(mine, *(step_record(step, 5.0) for step in (3, 4)))
    delivery.close("KILLED")
    assert curves(mine.path) == expected(mine)

    # the killed process was ahead of its checkpoint, and its steps are trained again
    METRICS.keep(mine.metrics, lambda record: record.step <= 2)
    [delivery] = others.follow(ours, mine, partial(follow_points, mine.metrics))
    add(mine, *(step_record(step, 4.0, time=50.0 + step) for step in (3, 4, 5)))
    add(mine, validation_record(5, 4.5, val_bpb=1.5, time=60.0))
    delivery.close("FINISHED")
    found = curves(mine.path)
    assert found == expected(mine)
    assert found["loss/train"] == [(1, 5.0), (2, 5.0), (3, 4.0), (4, 4.0), (5, 4.0)]
    assert [step for step, _ in found["loss/train_by_tokens"]] == [64, 128, 192, 256, 320]
    summary = accumulated(mine.path).SummaryMetadata("loss/train")
    assert summary.summary_description == "training loss in nats per token"


def test_records_that_are_dropped_during_a_run_are_dropped_from_the_file(mine):
    """As on several machines, whose ranks start again while the flow runs."""
    add(mine, *map(step_record, (1, 2, 3)))
    file, look = EventFile(mine.path), follow_points(mine.metrics)
    file.send(look())
    METRICS.keep(mine.metrics, lambda record: record.step <= 1)
    add(mine, step_record(2, 4.0))
    file.send(look())
    add(mine, step_record(3, 4.0))
    file.send(look())
    file.end("FINISHED")
    assert curves(mine.path) == expected(mine)


def test_content_depends_on_the_metrics_only_and_a_torn_file_is_completed(ours, mine):
    add(mine, *map(step_record, range(1, 6)))
    finish(ours, mine)
    whole, [file] = content(mine), event_files(mine.path)
    finish(ours, mine)
    assert content(mine) == whole and event_files(mine.path) == [file]
    file.write_bytes(whole[:-7])  # as a power cut leaves it
    finish(ours, mine)
    assert content(mine) == whole and event_files(mine.path) == [file]
    file.write_bytes(b"something else")
    finish(ours, mine)
    assert content(mine) == whole and [f.stat().st_size for f in event_files(mine.path)][:-1] == [0]
    assert curves(mine.path) == expected(mine)


def test_folder_that_cannot_be_written_is_a_warning_and_the_next_command_writes(
    ours, mine, package_log
):
    add(mine, step_record(1))
    blocked = mine.path / "events.out.tfevents.000001"
    blocked.mkdir()
    [delivery] = others.follow(ours, mine, partial(follow_points, mine.metrics))
    delivery.close("FINISHED")
    finish(ours, mine)
    warnings = [record.getMessage() for record in package_log.records if record.levelname[0] == "W"]
    assert ["failed; training continues" in text for text in warnings] == [True, False]
    assert "could not be added to TensorBoard" in warnings[1]
    blocked.rmdir()
    finish(ours, mine)
    assert curves(mine.path) == expected(mine)


def test_tracker_that_is_named_twice_is_used_once(ours, mine):
    add(mine, step_record(1))
    twice = ours.replace(log_to=("tensorboard", "tensorboard"))
    [delivery] = others.follow(twice, mine, partial(follow_points, mine.metrics))
    delivery.close("FINISHED")
    assert curves(mine.path) == expected(mine)


def test_steps_of_less_than_a_gflop_are_one_point(mine):
    add(mine, *(step_record(step, flops=step * 4 * 10**8) for step in range(1, 9)))
    file, look = EventFile(mine.path), follow_points(mine.metrics)
    file.send(look())
    file.end("FINISHED")
    found = curves(mine.path)["loss/train_by_gflops"]
    assert [step for step, _ in found] == [0, 1, 2, 3]


def test_command_that_shows_the_curves_is_logged(ours, mine, package_log):
    for delivery in others.follow(ours, mine, partial(follow_points, mine.metrics)):
        delivery.close("FINISHED")
    assert f"curves in TensorBoard: tensorboard --logdir {mine.path.parent}" in package_log.messages


def test_tensorflow_is_not_imported(tmp_path: Path):
    """It takes seconds and gigabytes; TensorBoard's own writer imports it if it is there."""
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pathlib import Path\n"
        "from zeroflow.tracking.points import NewPoints, Point\n"
        "from zeroflow.tracking.tensorboard_files import EventFile\n"
        f"file = EventFile(Path({str(tmp_path)!r}))\n"
        "file.send(NewPoints([Point('loss', 1.0, 1, 1.0)], from_start=True))\n"
        "file.end('FINISHED')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
