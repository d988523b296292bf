"""Jobs that are read again, and the reason why a job is trained."""

from pathlib import Path

import format1
from tiny import synthetic_rows, training_config, training_job

from zeroflow import artifacts
from zeroflow.training.job import TrainingJob, TrainResult, finished, why_trained
from zeroflow.training.workload import Workload


def test_job_of_format_1_is_read():
    job = TrainingJob.model_validate(format1.JOB)
    expected = Workload.model_validate(format1.WORKLOAD)
    assert job.training.workload == expected and job.model == expected.model
    assert (job.training.seed, job.training.steps, job.training.z_loss) == (0, 60, 0.0)
    assert TrainingJob.model_validate_json(job.model_dump_json()) == job
    more = format1.JOB["training"] | {"optimizer": {"beta2": 0.99}, "ranks": 2}
    other = TrainingJob.model_validate(format1.JOB | {"training": more}).training.workload
    assert (other.optimizer.beta2, other.ranks) == (0.99, 2)


def test_resumed_training_says_from_which_step_and_why(tmp_path):
    rows, tokens = synthetic_rows(tmp_path)
    training = training_config(steps=6)
    planned = training_job(tmp_path / "run", rows, tokens, training)

    def why() -> str:
        assert finished(planned) is None
        return why_trained(planned, lambda: "no other run is like it")

    assert why() == "no other run is like it"
    artifacts.write_json(planned.folder.job, {})
    assert why() == "an earlier start ended without a checkpoint"
    checkpoints = planned.folder.checkpoints
    (checkpoints / "step-00000004").mkdir(parents=True)
    newest = "its newest checkpoint is from step 4 of 6"
    assert why() == f"its training did not end: {newest}"
    artifacts.write_json(planned.folder.training, result(checkpoints, 4))
    assert why() == f"it was trained to step 4, and more steps are requested: {newest}"
    artifacts.write_json(planned.folder.training, result(checkpoints, 6))
    assert why() == f"step-00000006 is missing: {newest}"
    (checkpoints / "step-00000004").rename(checkpoints / "step-00000006")
    assert finished(planned) is not None


def result(checkpoints: Path, steps: int) -> dict[str, object]:
    """Return the result of a run with this number of steps."""
    losses = dict.fromkeys(("train_loss", "val_loss", "first_val_loss", "tokens_per_second"), 1.0)
    return TrainResult(
        checkpoint=checkpoints / f"step-{steps:08d}",
        steps=steps,
        tokens=64 * steps,
        **losses,
        val_bpb=None,
        mfu=None,
        peak_memory_bytes=0,
        sample="",
    ).model_dump(mode="json")
