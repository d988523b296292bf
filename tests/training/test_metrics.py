import json
import math
import subprocess
import sys

import pytest
from logged import step_record, validation_record

from zeroflow.tracking.points import Point
from zeroflow.training import metrics
from zeroflow.training.metrics import METRICS, TABLE, StepRecord, ValidationRecord, latest, points

# Lines that versions without a format wrote; the first is older than update ratios
OLDEST = (
    '{"step": 5, "tokens": 2560, "loss": 6.91, "lr": 0.0008, "grad_norm": 0.8, '
    '"tokens_per_second": null, "time": 1796053491.2}'
)
STEP = (
    '{"step": 5, "tokens": 2560, "flops": 2269839360, "loss": 6.9123382568359375, '
    '"lr": 0.0008333333333333334, "grad_norm": NaN, "update_ratio": 0.04189423471689224, '
    '"skipped_updates": 0, "first_epoch": true, "tokens_per_second": 37184.63035036045, '
    '"peak_memory_mib": 423.640625, "goodput": {"start": 0.9, "data": 0.1}, '
    '"time": 1796053491.239217}'
)
VALIDATION = (
    '{"step": 0, "tokens": 0, "flops": 0, "val_loss": 6.916815385222435, '
    '"val_bpb": 3.9572901316194535, "sample": "def msg", "time": 1796053491.1596806}'
)


def test_every_metric_of_the_table_is_a_field_and_has_its_own_key():
    fields = {*StepRecord.model_fields, *ValidationRecord.model_fields}
    assert fields >= TABLE.keys()
    assert len({metric.key for metric in TABLE.values()}) == len(TABLE)


def test_keys_of_mlflow_are_those_of_all_versions():
    """A run that is resumed by another version continues its curves."""
    shares = {"goodput": {"data": 0.25}}
    step = step_record(2, flops=4 * 10**9, update_ratio=0.1, peak_memory_mib=1.0, mfu=0.4, **shares)
    records = [step.replace(tokens_per_second=9.0), validation_record(2, val_bpb=1.0)]
    assert {point.key for point in points(records)} == {
        "loss/train",
        "loss/train_by_tokens",
        "loss/train_by_gflops",
        "loss/val",
        "loss/val_by_tokens",
        "loss/val_bpb",
        "loss/val_bpb_by_tokens",
        "optim/learning_rate",
        "optim/grad_norm",
        "optim/update_ratio",
        "optim/skipped_updates",
        "perf/tokens_per_second",
        "perf/mfu",
        "perf/peak_memory_mib",
        "time/data",
    }


def test_points_are_at_steps_tokens_and_gflops_and_none_is_skipped():
    found = list(points([step_record(3, 4.5, tokens=300, flops=7_999_999_999, time=1.5)]))
    meaning = "training loss in nats per token"
    assert found[:3] == [
        Point("loss/train", 4.5, 3, 1.5, "steps", meaning),
        Point("loss/train_by_tokens", 4.5, 300, 1.5, "tokens", meaning),
        Point("loss/train_by_gflops", 4.5, 7, 1.5, "gflops", meaning),
    ]
    assert {point.key for point in found[3:]} == {
        "optim/learning_rate",
        "optim/grad_norm",
        "optim/skipped_updates",
    }


def test_latest_value_of_each_metric_counts():
    records = [step_record(1, 5.0), validation_record(1, 4.8), step_record(2, 4.0, mfu=0.5)]
    found = latest([*records, step_record(3, 3.0)])
    assert (found["loss/train"], found["loss/val"], found["perf/mfu"]) == (3.0, 4.8, 0.5)
    assert TABLE["loss"].text(found["loss/train"]) == "3.0000 nats per token"


def test_metric_that_is_added_is_drawn(monkeypatch):
    class Wider(StepRecord):
        weight_norm: float

    added = metrics.Metric("optim/weight_norm", "weight norm")
    monkeypatch.setitem(TABLE, "weight_norm", added)
    record = Wider(**step_record(4).model_dump(), weight_norm=12.0)
    assert Point("optim/weight_norm", 12.0, 4, 4.0, label="weight norm") in points([record])
    assert latest([record])["optim/weight_norm"] == 12.0


@pytest.mark.parametrize("line", [OLDEST, STEP, VALIDATION])
def test_line_of_an_older_version_is_read_with_all_its_bits(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    [record] = METRICS.read(path)
    assert isinstance(record, ValidationRecord if "val_loss" in line else StepRecord)
    METRICS.append(path, record)
    before, again = (json.loads(text) for text in path.read_text().splitlines())
    assert again.pop("format") == 1
    assert repr({name: again[name] for name in before}) == repr(before)
    if line != OLDEST:
        assert again.keys() == before.keys()


def test_non_finite_loss_is_stored_unchanged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for loss in (math.nan, math.inf):
        METRICS.append(path, validation_record(1, loss))
    first, second = METRICS.read(path)
    assert math.isnan(first.val_loss) and second.val_loss == math.inf


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent():
    held = b"x" * 2**30  # getrusage of a child starts at the memory of its parent
    code = (
        "from types import SimpleNamespace as N; from zeroflow.training import metrics;"
        "job = N(training=N(workload=N(device='cpu'))); print(metrics.peak_memory_bytes(job))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert 2**27 < int(printed) < len(held), "PyTorch alone takes 200 MiB"
