"""The comparison of a sweep's runs, also those of earlier commands."""

import pytest

from zeroflow import artifacts
from zeroflow.report import comparison
from zeroflow.report import sweep as sweep_report
from zeroflow.report.comparison import Outcome
from zeroflow.settings.settle import settle
from zeroflow.settings.sweep import SweepConfig, cells
from zeroflow.tracking import tracker


def test_sweep_of_the_name_with_other_settings_is_refused_before_anything_is_changed(tmp_path):
    given = {"device": "cpu", "data": {"data_mode": "synthetic"}, "cache_dir": tmp_path}
    first = SweepConfig(sweep_name="s", sizes=("tiny",), run=given)
    [cell] = cells(first)
    run = settle(cell).run
    (run.run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    sweep_report.require_as_started(first)
    more = first.model_copy(update={"sizes": ("tiny", "small")})
    sweep_report.require_as_started(more)
    other = {**given, "training": {"learning_rate": 0.5}}
    with pytest.raises(ValueError, match="s-tiny of sweep s was started with"):
        sweep_report.require_as_started(
            SweepConfig(sweep_name="s", sizes=("small", "tiny"), run=other)
        )


def test_runs_of_an_earlier_command_stay_in_the_comparison(tmp_path, monkeypatch):
    for name, sweep in (("s-tiny-seed0", "s"), ("t-tiny-seed0", "t"), ("alone", None)):
        artifacts.write_json(tmp_path / "runs" / name / "run.json", {"sweep": sweep})
    (tmp_path / "runs" / "alone" / "run.json").write_text("{")
    monkeypatch.setattr(comparison, "outcome", lambda cache, name: ended(name))
    monkeypatch.setattr(tracker, "close_group", lambda *told, **more: None)
    added = SweepConfig(sweep_name="s", sizes=("tiny",), seeds=(1,), run={"cache_dir": tmp_path})
    added.folder.path.mkdir(parents=True)
    page = sweep_report.compare(added, failed=[]).linked
    assert "2 runs," in page and "| tiny-seed0 |" in page and "| tiny-seed1 |" in page


def ended(name: str) -> Outcome:
    return Outcome(
        run=name,
        size="tiny",
        seed=0,
        learning_rate=1e-3,
        parameters=1000,
        vocabulary=512,
        context=32,
        flops_per_token=6000,
        tokens=100,
        val_loss=5.0,
        val_bpb=None,
        metrics={"loss/val": 5.0},
        tokens_per_second=None,
        seconds=1.0,
        ranks=1,
        zero_stage=0,
        peak_memory_bytes=2**30,
        curve=((0, 6.0), (100, 5.0)),
    )
