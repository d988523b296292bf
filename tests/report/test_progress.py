"""Display of the progress of training."""

import io
import logging
import time

import pytest
from logged import step_record, validation_record
from rich.console import Console

from zeroflow.report import progress as progress_module
from zeroflow.report.progress import CheckProgress, SpikeWatch, TrainingProgress
from zeroflow.training.events import Done, Metrics, Saved, Spike, Started
from zeroflow.training.pulse import Pulse


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by the clock of the process."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def started(step: int = 0, steps: int = 100) -> Started:
    return Started(time=0.0, step=step, steps=steps, parts=1)


def logged(step: int, at: float, rate: float | None = 640.0) -> Metrics:
    record = step_record(step, 5.0 - step / 100, time=at, tokens_per_second=rate)
    return Metrics(record=record)


def test_every_logged_step_is_shown_with_its_share_and_the_time_left(passed):
    shown = []
    with TrainingProgress(lambda share, text: shown.append((share, text))) as progress:
        progress(started())
        progress(logged(1, at=60.0, rate=None))
        progress(Metrics(record=validation_record(1, time=61.0)))
        progress(logged(11, at=80.0))
        progress(Saved(time=81.0, step=11, path="step-00000011"))
        progress(logged(51, at=160.0))
        progress(logged(100, at=258.0))
    assert [share for share, _ in shown] == [0.01, 0.11, 0.51, 1.0]
    first, second, third, last = (text for _, text in shown)
    assert first == "step 1/100  loss 4.9900", "the first step says nothing of the speed"
    # 2 s a step since the first one, which took a minute
    assert second == "step 11/100  loss 4.8900  640 tokens/s  ETA 2 min 58 s"
    assert "ETA 1 min 38 s" in third
    assert last == "step 100/100  loss 4.0000  640 tokens/s  ETA 0 s"


def test_speed_after_a_resume_is_that_of_the_new_process(passed):
    shown = []
    with TrainingProgress(lambda share, text: shown.append(text)) as progress:
        progress(started(step=60))
        progress(logged(61, at=1000.0))
        progress(logged(71, at=1010.0))
    assert "ETA 29 s" in shown[-1], "1 s per step, independent of earlier steps"


def test_bar_moves_with_every_step_and_within_a_validation(passed, monkeypatch):
    monkeypatch.setattr(progress_module, "console", Console(force_terminal=True, width=80))
    shown = []
    with TrainingProgress(lambda share, text: shown.append(text)) as progress:
        progress(started())
        progress(Pulse("validation", 16, 32))
        assert bar(progress) == ("validation", 16, 32, "16/32 after step 0")
        progress(logged(1, at=60.0))
        progress(Pulse("training", 2, 100))
        assert bar(progress) == ("step 2/100", 2, 100, "loss 4.9900  640 tokens/s")
        progress(Pulse("text sample", 5, 48))
        assert bar(progress) == ("text sample", 5, 48, "5/48 after step 2")
    assert shown[0] == "validation: 16/32 after step 0"


def test_last_line_elsewhere_is_that_of_the_last_step(passed):
    shown = []
    with TrainingProgress(lambda share, text: shown.append((share, text))) as progress:
        progress(started(steps=10))
        progress(logged(10, at=60.0))
        progress(Pulse("validation", 32, 32))
        progress(Done(time=61.0, step=10))
    last = (1.0, "step 10/10  loss 4.9000  640 tokens/s")
    assert shown == [last, (0.999, "validation: 32/32 after step 10"), last]


def test_bar_with_loss_speed_and_time_left_fits_into_80_columns(passed):
    progress = TrainingProgress()
    progress(started(steps=20_000))
    progress(logged(1, at=0.0))
    progress(logged(12_345, at=99_999.0, rate=1_234_567.0))
    screen = Console(width=80, file=io.StringIO())
    screen.print(progress._bar.get_renderable())
    [line] = screen.file.getvalue().splitlines()
    assert line.startswith("step 12345/20000 ━") and line.rstrip().endswith("ETA 17 h 13 min")


def bar(progress):
    [task] = progress._bar.tasks
    return task.description, task.completed, task.total, task.fields["text"]


def test_check_logs_its_progress_after_a_silence(passed, caplog):
    caplog.set_level(logging.INFO, logger="zeroflow")
    shown = []
    with CheckProgress("overfit check", lambda share, text: shown.append(share)) as progress:
        for step in range(1, 31):
            passed[0] += 1
            progress(Pulse("overfit check", step, 40, f"loss {4 - step / 10:.4f}"))
            progress(Pulse("something else", 1, 2))
    assert caplog.messages == ["overfit check: step 16/40  loss 2.4000"]
    assert shown == [step / 40 for step in range(1, 31)]


def test_log_has_occasional_lines_and_always_the_last_step(passed, caplog):
    caplog.set_level(logging.INFO, logger="zeroflow")
    with TrainingProgress() as progress:
        progress(started())
        for step in range(1, 101):
            passed[0] += 1
            progress(logged(step, at=float(step)))
    steps = [int(r.getMessage().split()[1].split("/")[0]) for r in caplog.records]
    assert steps == [1, 17, 33, 49, 65, 81, 97, 100], "not within 15 s of the one before"


def test_spikes_are_told_at_most_once_an_hour(passed):
    told: list[str] = []
    watch = SpikeWatch(told.append)
    for step in range(1000, 1200, 10):
        watch(logged(step, at=0.0))
        watch(Spike(time=0.0, step=step, alarms=["loss 9", "gradient norm 8"]))
        passed[0] += 400.0
    assert told == [
        "step 1,000: loss 9; gradient norm 8",
        "step 1,090: loss 9; gradient norm 8",
        "step 1,180: loss 9; gradient norm 8",
    ]
