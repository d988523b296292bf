from pathlib import Path

import format1
import pytest
import torch
from checked import SHARDS, assert_failed, checked_job
from tiny import apart_from_reuse, with_workload

from zeroflow import artifacts, reuse
from zeroflow.checks import preflight, step_checks
from zeroflow.checks.preflight import PreflightFailed, PreflightJob
from zeroflow.data.build import build_shards
from zeroflow.training import failures, recovery
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.job import TrainingJob

CHECKS = [
    "checksums",
    "token ids",
    "text",
    "lost text",
    "loss at initialisation",
    "gradients",
    "causality",
    "documents",
    "overfit batch",
    "micro-batch",
    "checkpoint",
]


@pytest.fixture
def job(text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """A job on text; its processes are this one."""

    def launch_here(module, job_file, on_event, *, ranks, compile_cache):
        try:
            given = PreflightJob.model_validate_json(job_file.read_text(encoding="utf-8"))
            preflight.work(given, stop=lambda: False)
        except Exception as error:
            raise TrainingFailed(str(error), failures.reason(error)) from error

    monkeypatch.setattr(preflight, "launch", launch_here)
    return checked_job(tmp_path, build_shards(SHARDS, *text[:2], tmp_path), text.tokenizer)


def reused(job: TrainingJob) -> str:
    """Why the earlier result counts, without a new check."""
    result = preflight.check(job, trained=True)
    assert result is not None and result.reused
    return result.why


def test_sound_job_passes_every_check_once(job):
    assert preflight.check(job, trained=True) is None, "a finished run is not checked afterwards"
    result = preflight.check(job)
    assert [check.name for check in result.checks if check.name in CHECKS] == CHECKS
    assert all(check.passed and check.figure and check.sentence for check in result.checks)
    assert result.passed and apart_from_reuse(result) == preflight.read(job.folder)
    assert {path.name for path in job.run_dir.iterdir() if not path.name.startswith(".")} == {
        "events.jsonl",
        "preflight.json",
        "preflight-job.json",
    }

    assert result.why == "the run has no earlier one"
    same = result.replace(reused=True, why=reuse.PASSED)
    assert preflight.check(job) == same
    longer = job.training.replace(schedule=job.training.schedule.replace(steps=99))
    assert preflight.check(job.replace(training=longer)) == same
    elsewhere = with_workload(job.training, device_name="another CPU")
    assert reused(job.replace(training=elsewhere)) == reuse.TRAINED
    fewer = with_workload(job.training, micro_batch_rows=2, accumulate=4)
    assert reused(job.replace(training=fewer)) == reuse.TRAINED


def test_check_that_is_repeated_says_what_changed(job, monkeypatch):
    before = preflight.check(job)
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    again = preflight.check(job)
    installed = before.identity["torch"]
    assert again.why == f"the earlier one has torch {installed} instead of 99.0.0"
    fewer = with_workload(job.training, micro_batch_rows=2, accumulate=4)
    third = preflight.check(job.replace(training=fewer))
    assert "has --batch-size 4 instead of 2, --grad-accum-steps 2 inst" in third.why


def test_micro_batch_that_does_not_fit_is_halved_as_in_training(job, monkeypatch):
    step = step_checks.train_step

    def with_room_for_two_rows(state, micro_batches, config):
        if len(micro_batches[0].inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(state, micro_batches, config)

    monkeypatch.setattr(step_checks, "train_step", with_room_for_two_rows)
    result = preflight.check(job)
    assert result.passed and "2 rows x 32 tokens fit" in result.checks[-2].figure
    [entry] = recovery.read(job.folder)
    assert entry.micro_batch_rows == 2 and "instead of 4" in entry.action
    trained = recovery.current(job).training.workload
    assert (trained.micro_batch_rows, trained.accumulate) == (2, 4)
    assert preflight.check(job).checks == result.checks


def test_row_that_does_not_fit_says_what_to_change(job, monkeypatch):
    def without_room(state, micro_batches, config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_checks, "train_step", without_room)
    result = preflight.check(job)
    assert not result.passed and reused(job) == reuse.TRAINED
    actions = [entry.action for entry in recovery.read(job.folder)]
    assert len(actions) == 3 and "recomputes" in actions[-1]
    message = str(PreflightFailed(result))
    assert "micro-batch: 1 row does not fit" in message and "lower --seq-len" in message


def test_other_errors_are_reported_unchanged(job, monkeypatch):
    def broken(*inputs):
        raise ValueError("a bug")

    monkeypatch.setattr(step_checks, "train_step", broken)
    with pytest.raises(TrainingFailed, match="a bug\nthe pre-flight checks failed"):
        preflight.check(job)
    assert recovery.read(job.folder) == []


def test_ids_outside_the_vocabulary_are_caught_and_not_trained_on(job):
    few = job.tokenizer.replace(vocab_size=100)
    result = preflight.check(job.replace(tokenizer=few))
    [ids] = [check for check in result.checks if not check.passed]
    assert_failed(ids, "vocabulary has 100 tokens", "a tokenizer other than", str(job.shards.path))
    names = [check.name for check in result.checks]
    assert "micro-batch" not in names and "text" not in names


def test_flipped_byte_of_a_shard_is_caught(job):
    file = next(job.shards.part_paths[0].glob("train-*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = preflight.check(job)
    [check] = [check for check in result.checks if not check.passed]
    assert_failed(check, "a part is damaged", file.name, "sha256 differs", "rebuild it")


def test_checks_that_passed_in_format_1_are_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", format1.TORCH)
    job = TrainingJob.model_validate(format1.JOB).replace(run_dir=tmp_path)
    passed = {"passed": True, "job": format1.PREFLIGHT, "seconds": 1.5, "checks": []}
    artifacts.write_json(job.folder.preflight, passed)
    assert reused(job) == reuse.PASSED
