import format1
import numpy as np
import pytest
import torch
from checked import assert_failed
from tiny import MODEL, NO_END, ArrayRows, synthetic_rows, training_config, with_workload

from zeroflow import artifacts, reuse
from zeroflow.checks import overfit as checks
from zeroflow.checks.check import named
from zeroflow.checks.overfit import FixedBatch, OverfitConfig, OverfitJob, OverfitResult
from zeroflow.data.batches import MicroBatch, to_micro_batch
from zeroflow.training.config import TrainingConfig
from zeroflow.training.job import TrainingJob
from zeroflow.training.optimizers.adamw import AdamW
from zeroflow.training.state import TrainState, new_state

LIMITS = OverfitConfig(overfit_steps=80, overfit_loss=0.1)
CONFIG = training_config(steps=200, peak=1e-2, optimizer=AdamW(beta2=0.95))
ROWS = np.random.default_rng(0).integers(MODEL.vocab_size, size=(2, 17), dtype=np.int32)
BATCH = FixedBatch(to_micro_batch(ROWS, end_of_text=NO_END))


def run(state: TrainState | None = None, batches: object = BATCH) -> OverfitResult:
    result = checks.overfit(state or new_state(CONFIG), batches, CONFIG, LIMITS)
    assert result is not None
    return result


def test_sound_model_overfits_the_batch_the_same_way_each_time():
    first, again = run(), run()
    assert first.passed and first.loss < 0.1 and 5 < first.steps < 80
    # fresh weights
    assert first.curve[0] == pytest.approx(np.log(MODEL.vocab_size), abs=0.1)
    assert len(first.curve) == first.steps
    assert first.curve == again.curve


def test_frozen_block_is_caught_although_the_batch_is_overfitted():
    state = new_state(CONFIG)
    state.model.model.layers[0].requires_grad_(False)
    result = run(state)
    assert not result.passed and result.loss < 0.1
    assert "gradients did not change 9 parameters, for example model.layers.0." in result.reason


def test_detached_block_is_caught_although_the_batch_is_overfitted():
    state = new_state(CONFIG)
    block = state.model.model.layers[1].self_attn
    forward = block.forward
    block.forward = lambda *inputs: forward(*inputs).detach()
    result = run(state)
    assert not result.passed and result.loss < 0.1
    assert "did not change" in result.reason and "for example model.layers.1." in result.reason


def test_matrix_that_only_decays_is_caught():
    state = new_state(CONFIG)
    state.model.model.layers[0].self_attn.k_proj.weight.register_hook(torch.zeros_like)
    result = run(state)
    assert not result.passed
    assert "model.layers.0.self_attn.k_proj.weight" in result.reason


def test_learning_rate_of_zero_is_caught(monkeypatch):
    set_learning_rate = AdamW.set_learning_rate
    still = lambda self, optimizer, rate: set_learning_rate(self, optimizer, 0.0)  # noqa: E731
    monkeypatch.setattr(AdamW, "set_learning_rate", still)
    result = run()
    assert not result.passed and result.steps == LIMITS.overfit_steps
    assert "in 80 steps, not below 0.1; it was hardly falling any more" in result.reason
    assert "gradients, optimiser or labels are broken, or the model is too small" in result.reason
    assert result.curve == [result.curve[0]] * 80


@pytest.mark.parametrize(("share", "passed"), [(0.8, True), (0.5, False)])
def test_loss_that_is_still_falling_has_half_as_many_steps_more(share, passed):
    needed = run().steps
    limits = LIMITS.replace(overfit_steps=int(share * needed))
    result = checks.overfit(new_state(CONFIG), BATCH, CONFIG, limits)
    assert result is not None and result.passed is passed
    assert result.steps == (needed if passed else int(1.5 * limits.overfit_steps))
    raised = f"; it was still falling: raise --overfit-steps, now {limits.overfit_steps}"
    assert result.reason.endswith(raised) is not passed


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_said_to_be_too_few(steps):
    result = checks.overfit(new_state(CONFIG), BATCH, CONFIG, LIMITS.replace(overfit_steps=steps))
    assert result is not None and not result.passed and result.steps <= 1.5 * steps


def test_labels_that_change_at_every_step_are_caught():
    class Changing:
        def micro_batches(self, step: int) -> list[MicroBatch]:
            shift = torch.randint(
                1, MODEL.vocab_size, (1,), generator=torch.Generator().manual_seed(step)
            )
            return [BATCH.batch._replace(targets=(BATCH.batch.targets + shift) % MODEL.vocab_size)]

    result = run(batches=Changing())
    assert not result.passed and "not below 0.1" in result.reason


END = 9
"""The end of text of the rows below."""


@pytest.mark.parametrize(
    ("rows", "document_mask", "least"),
    [
        # After the same three tokens the two rows have 4 and 5: two of six targets are a coin toss
        ([[1, 2, 3, 4], [1, 2, 3, 5]], False, 2 * np.log(2) / 6),
        # The second row has seen another token before, so nothing is ambiguous
        ([[1, 2, 3, 4], [6, 2, 3, 5]], False, 0),
        # The same contexts, in documents of their own at different places: after 1 comes 2, 3 or 4
        ([[1, 2, END, 1, 3], [END, 1, 4, END, 7]], True, 3 * np.log(3) / 8),
        ([[1, 2, END, 1, 3], [END, 1, 4, END, 7]], False, 0),
        # A token repeated is one context: after 1 comes 1, 1 or 2
        ([[1, 1, 1, 2]], False, (2 * np.log(3 / 2) + np.log(3)) / 3),
        # Padding is no target
        ([[1, 2, END, END, END], [1, 2, END, END, END]], True, 0),
    ],
)
def test_lowest_loss_is_the_entropy_of_targets_after_equal_contexts(rows, document_mask, least):
    batch = to_micro_batch(np.array(rows), end_of_text=END, document_mask=document_mask)
    assert checks.least_loss(batch) == pytest.approx(least)


AMBIGUOUS = np.array([[1, n, END, 2, 10 + n % 3, END, 1, 20 + n, END] for n in range(4)])
"""Documents of two tokens: the second is a guess, under a document mask."""


@pytest.fixture
def ambiguous() -> tuple[FixedBatch, TrainingConfig, float]:
    batch = to_micro_batch(AMBIGUOUS, end_of_text=END, document_mask=True)
    config = training_config(
        steps=200, peak=1e-2, optimizer=AdamW(beta2=0.95), document_mask=True, seq_len=8
    )
    return FixedBatch(batch), config, checks.least_loss(batch)


def test_sound_model_passes_on_a_batch_that_no_model_can_memorise(ambiguous):
    batches, config, least = ambiguous
    assert least > 5 * LIMITS.overfit_loss
    result = checks.overfit(new_state(config), batches, config, LIMITS, least=least)
    assert result.passed and least < result.loss < least + LIMITS.overfit_loss
    assert result.least_loss == least
    assert f"the lowest possible is {least:.4f}" in result.reason


def test_model_that_stays_above_the_lowest_loss_fails(ambiguous):
    batches, config, least = ambiguous
    deaf = new_state(config)
    for block in deaf.model.model.layers:  # every token is a guess without its context
        block.self_attn.forward = lambda x, *others: x * 0
        block.mlp.forward = lambda x: x * 0
    result = checks.overfit(deaf, batches, config, LIMITS, least=least)
    assert not result.passed and result.loss > least + LIMITS.overfit_loss
    assert f"not below {least + 0.1:.4g} (the lowest possible is {least:.4f})" in result.reason


def test_check_ends_after_a_step_when_asked_to():
    answers = iter([False, False, True])
    state = new_state(CONFIG)
    assert checks.overfit(state, BATCH, CONFIG, LIMITS, stop=lambda: next(answers)) is None
    assert state.step == 3


def test_settings_are_those_of_the_run_except_batch_and_schedule():
    run_settings = training_config(seed=7, steps=10**6, micro_batch_rows=64, accumulate=9)
    limits = OverfitConfig(overfit_steps=150)
    settings = checks.settings(run_settings, limits)
    own = {"schedule": settings.schedule, "workload": settings.workload}
    assert settings == run_settings.replace(**own)
    batch = {"micro_batch_rows": 4, "accumulate": 1}
    assert settings.workload == run_settings.workload.replace(**batch)
    rates = [settings.schedule.learning_rate(step) for step in range(int(1.5 * 150))]
    assert set(rates[10:]) == {max(rates)}, "no decay within the check"
    wider = with_workload(run_settings, model=MODEL.replace(hidden_size=2048))
    wide = checks.settings(wider, limits)
    assert wide.schedule.peak < settings.schedule.peak, "wide models want small steps"


def test_batch_is_the_beginning_of_the_first_rows():
    rows = np.arange(10 * 100).reshape(10, 100).view(ArrayRows)
    of_run = training_config(seq_len=99)
    workload = checks.settings(of_run, LIMITS).workload
    [batch] = checks.fixed_batch(rows, workload).micro_batches(0)
    assert batch.inputs.tolist() == rows[:4, :64].tolist()
    assert batch.targets.tolist() == rows[:4, 1:65].tolist()
    workload = checks.settings(with_workload(of_run, seq_len=8), LIMITS).workload
    [only] = checks.fixed_batch(rows[:1, :9], workload).micro_batches(5)
    assert only.inputs.tolist() == rows[:1, :8].tolist()


class EndedRows(ArrayRows):
    end_of_text = END


def test_batch_excludes_rows_of_padding_and_the_pre_flight_fails_if_all_rows_are_padding():
    padding, text = [END] * 9, [1, 2, 3, END, 4, 5, 6, 7, END]
    half = [1, 2, END, *[END] * 6]
    rows = np.array([padding, padding, half, padding, text, half, half, text]).view(EndedRows)
    config = training_config(seq_len=8)
    workload = checks.settings(config, LIMITS).workload
    [batch] = checks.fixed_batch(rows, workload).micro_batches(0)
    assert batch.inputs.tolist() == [row[:-1] for row in (text, text, half, half)]
    check = checks.batch_check(rows, config)
    # Both kinds come twice, and differ after "1, 2": 3 or the end
    assert check.passed and check.figure == f"{4 * np.log(2) / 20:.4f} nats"
    assert_failed(checks.batch_check(rows[:2], config), "begin with padding only")


def test_failure_message_has_the_reason_and_the_curve():
    curve = [5.0 - step / 100 for step in range(200)]
    result = OverfitResult(passed=False, loss=3.01, steps=200, reason="because", curve=curve)
    message = str(checks.OverfitFailed(result))
    assert "because" in message and "5.000" in message and "3.010" in message
    assert len(message) < 300


@pytest.fixture
def job(tmp_path, monkeypatch) -> OverfitJob:
    """A job for which the check runs in this process, on the one batch."""

    def launch_here(module, job_file, on_event, *, ranks, compile_cache):
        checks.work(OverfitJob.model_validate(artifacts.read_json(job_file)), stop=lambda: False)

    monkeypatch.setattr(checks, "launch", launch_here)
    monkeypatch.setattr(checks, "Rows", lambda shards, split: None)
    monkeypatch.setattr(checks, "fixed_batch", lambda rows, workload: BATCH)
    rows, _ = synthetic_rows(tmp_path)
    return OverfitJob(run_dir=tmp_path, training=CONFIG, shards=rows, limits=LIMITS)


def test_check_is_repeated_only_for_a_stated_reason(job):
    first, again = checks.check(job), checks.check(job)
    assert (first.reused, first.why) == (False, reuse.FIRST)
    assert again == first.replace(reused=True, why=reuse.PASSED)

    stricter = job.replace(limits=LIMITS.replace(overfit_steps=1))
    changed, after = checks.check(stricter), checks.check(stricter)
    assert not changed.passed and "--overfit-steps 80 instead of 1" in changed.why
    assert (after.reused, after.why) == (False, "the earlier one failed")

    record = artifacts.read_json(job.folder.overfit)
    del record["identity"]
    artifacts.write_json(job.folder.overfit, record)
    assert "the inputs of the earlier check are unknown" in checks.check(job).why


def test_check_that_passed_in_format_1_is_not_repeated(tmp_path):
    job = TrainingJob.model_validate(format1.JOB)
    same = OverfitJob(
        run_dir=tmp_path, training=job.training, shards=job.shards, limits=OverfitConfig()
    )
    passed = {"passed": True, "job": format1.OVERFIT, "loss": 0.09, "steps": 44, "curve": [7.0]}
    artifacts.write_json(same.folder.overfit, passed | {"reason": "loss 0.09 after 44 steps"})
    assert checks.check(same).reused


def test_reason_to_repeat_the_check_names_no_inner_setting():
    then = {"training": {"schedule": {"steps": 45, "warmup_steps": 5}}, "limits": {}}
    now = {"training": {"schedule": {"steps": 305, "warmup_steps": 9}}, "limits": {}}
    before = OverfitResult.model_construct(passed=True, identity=then)
    assert reuse.since(now, before, named) == (
        "the earlier one has steps of the check 45 instead of 305, "
        "warmup steps of the check 5 instead of 9"
    )
