"""The proof that resume is exact finds every difference, and reports no others."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from zeroflow import pipeline
from zeroflow.checks import kills, resume
from zeroflow.checks.resume import Kill, Proof, ResumeInexact
from zeroflow.run_folder import RunFolder
from zeroflow.settings.proof import ProofRun
from zeroflow.training import checkpoint
from zeroflow.training.events import EVENTS, Done, Event, Failed, Started, Stopped
from zeroflow.training.job import TrainingJob, TrainResult
from zeroflow.training.launch import launch
from zeroflow.training.metrics import METRICS, StepRecord
from zeroflow.training.retention import Retention
from zeroflow.training.saver import Saver
from zeroflow.training.state import new_state

STEPS = 24
ASKED = ProofRun(
    proof={"kills": 2, "kill_seed": 6},  # with this seed, in the start-up and then in training
    run={
        "run_name": "proof",
        "device": "cpu",
        "training": {
            "max_steps": STEPS,
            "checkpoint_every": 4,
            "validate_every": 5,
            "validation_tokens": 128,
            "seq_len": 32,
            "sample_tokens": 4,
        },
    },
)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a proof whose training forgets its random numbers."""
    cache = tmp_path_factory.mktemp("forgetful")

    def train(job: TrainingJob, on_event) -> TrainResult:
        job.write(job.folder.job)
        launch("forgetful", job.folder.job, on_event)
        return TrainResult.read(job.folder.training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "train", train)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"), prepend=":")
        patch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(ResumeInexact):
            pipeline.prove_resume(ASKED.replace(run=ASKED.run.replace(cache_dir=cache)))
    return cache / "runs" / "proof"


def test_forgotten_random_numbers_are_caught_at_the_first_step_they_change(forgetful):
    proof = Proof.read(forgetful / "proof.json")
    assert not proof.passed
    started = [e.step for e in history(forgetful) if isinstance(e, Started)]
    resumed = [step for step in started if step]
    assert resumed, "the run started over, so it did not use the checkpoint"
    assert (proof.difference.step, proof.difference.quantity) == (resumed[0] + 1, "loss")
    names = ("undisturbed", "killed")
    undisturbed, killed = (logged(RunFolder(forgetful / name)) for name in names)
    first = next(s for s in range(1, STEPS + 1) if undisturbed[s].loss != killed[s].loss)
    assert first == proof.difference.step
    assert proof.difference.killed == killed[first].loss.hex()
    assert "random-number generator" in proof.reason and "**FAILED**" in page(forgetful)
    assert len(set(proof.sha256.values())) == 2


def test_kills_are_reported_with_their_moments(forgetful):
    proof = Proof.read(forgetful / "proof.json")
    started = [e.step for e in history(forgetful) if isinstance(e, Started)]
    # a start-up that was killed has logged no event
    assert started[-1] == proof.kills[-1].resumed_at
    assert set(started) <= {0, *(kill.resumed_at for kill in proof.kills)}
    assert sum(isinstance(e, Done) for e in history(forgetful)) == 1
    assert not any(isinstance(e, Failed | Stopped) for e in history(forgetful))


def test_kills_cover_all_targets_and_are_spread_over_the_steps(forgetful):
    events = EVENTS.read(forgetful / "undisturbed" / "events.jsonl")
    found = kills.intervals(events, 3.0)
    assert {interval.target for interval in found} == set(kills.TARGETS)
    assert sum(interval.target == "training" for interval in found) >= STEPS - 6
    for seed in range(20):
        chosen = kills.choose(found, kills=4, seed=seed, last=STEPS)
        assert chosen == kills.choose(found, kills=4, seed=seed, last=STEPS)
        assert sorted(interval.target for interval in chosen) == sorted(kills.TARGETS)
        steps = [interval.step for interval in chosen if interval.target != "start-up"]
        assert steps == sorted(set(steps)), "one after the other"
        assert min(steps) < STEPS / 2 <= max(steps) < STEPS


@pytest.fixture
def twins(forgetful, tmp_path) -> tuple[TrainingJob, TrainingJob]:
    """Two copies of a finished training."""
    source = forgetful / "undisturbed"
    for name in ("undisturbed", "killed"):
        shutil.copytree(source, tmp_path / name)
    job = TrainingJob.read(source / "job.json")
    return tuple(job.replace(run_dir=tmp_path / name) for name in ("undisturbed", "killed"))


KILLS = [Kill(aimed_at="training", moment="after step 7", step=7, resumed_at=4)]


def judged(twins: tuple[TrainingJob, TrainingJob]) -> Proof:
    return resume.compare(*twins, KILLS, 1)


def test_equal_runs_pass_if_one_was_killed(twins):
    proof = judged(twins)
    assert proof.passed and proof.difference is None
    # 24 losses and gradient norms; validations at 0, 5, 10, 15, 20, 24
    assert proof.numbers == 2 * STEPS + 6
    unharmed = resume.compare(*twins, [], 1)
    assert not unharmed.passed and "before it could be killed" in unharmed.reason


@pytest.mark.parametrize("quantity", ["loss", "grad_norm", "val_loss"])
@pytest.mark.parametrize("step", [5, 20])
def test_last_bit_of_one_number_is_caught(twins, quantity, step):
    lines = lines_of(twins[1])
    [line] = [m for m in lines if m["step"] == step and quantity in m]
    line[quantity] = math.nextafter(line[quantity], math.inf)
    rewrite(twins[1], lines)
    proof = judged(twins)
    assert not proof.passed
    assert (proof.difference.step, proof.difference.quantity) == (step, quantity)
    assert proof.difference.killed == line[quantity].hex() != proof.difference.undisturbed


def test_missing_or_repeated_record_is_caught(twins):
    lines = lines_of(twins[1])
    place = next(i for i, line in enumerate(lines) if line["step"] == 9)
    rewrite(twins[1], lines[:place] + lines[place + 1 :])
    assert "step 9 is the first that differs: loss is" in judged(twins).reason
    assert judged(twins).difference.killed == ""
    rewrite(twins[1], [*lines, lines[place]])
    assert " and 0x" in judged(twins).difference.killed


def test_difference_before_any_resume_is_attributed_to_the_machine(twins):
    lines = lines_of(twins[1])
    for line in lines:
        if "loss" in line and line["step"] >= 4:
            line["loss"] += 1e-6
    rewrite(twins[1], lines)
    assert "even without kills" in judged(twins).reason


def test_last_bit_of_one_moment_is_caught_by_name(twins):
    job = twins[1]
    state = new_state(job.training)
    saved = checkpoint.latest(job.folder.checkpoints)
    checkpoint.load(state, saved, tokenizer=job.tokenizer.fingerprint)
    moment = state.optimizer.state[state.model.model.norm.weight]["exp_avg"]
    moment.view(torch.int32)[3] ^= 1
    shutil.rmtree(saved)
    saver = Saver(job.folder.checkpoints, Retention(keep=2), tokenizer=job.tokenizer.fingerprint)
    saver.save(state)
    saver.wait()
    proof = judged(twins)
    assert not proof.passed
    assert proof.difference.step == STEPS
    assert proof.difference.quantity == "optimizer.model.norm.weight.exp_avg"


def history(folder: Path) -> list[Event]:
    return EVENTS.read(folder / "killed" / "events.jsonl")


def page(folder: Path) -> str:
    return (folder / "proof.md").read_text(encoding="utf-8")


def logged(folder: RunFolder) -> dict[int, StepRecord]:
    records = METRICS.read(folder.metrics)
    return {record.step: record for record in records if isinstance(record, StepRecord)}


def lines_of(job: TrainingJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.folder.metrics.read_text().splitlines()]


def rewrite(job: TrainingJob, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    job.folder.metrics.write_text(text, encoding="utf-8")
