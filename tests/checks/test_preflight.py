from pathlib import Path

import format1
import pytest
import torch
from tiny import (
    MODEL,
    SHAPE,
    apart_from_reuse,
    jsonl_corpus,
    lively_model,
    training_config,
    training_job,
    with_workload,
)

from zeroflow import artifacts, reuse
from zeroflow.checks import preflight
from zeroflow.checks.preflight import Check, PreflightFailed, PreflightJob
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig, fetch_tokenizer
from zeroflow.model import attention
from zeroflow.model.llama import FeedForward
from zeroflow.model.sizes import with_vocabulary
from zeroflow.training import checkpoint, recovery, worker
from zeroflow.training.job import TrainingFailed, TrainingJob
from zeroflow.training.state import TrainState, new_state

CONFIG = training_config(document_mask=True, seq_len=64)
FP8 = {"precision": "bf16", "fp8": True}
BATCH = preflight.random_batch(CONFIG.workload, seed=0)
SHARDS = ShardConfig(seq_len=32, train_rows=40, validation_rows=2, validation_fraction=0.1)
ALL_CHECKS = [
    "checksums",
    "token ids",
    "text",
    "loss at initialisation",
    "gradients",
    "causality",
    "documents",
    "micro-batch",
    "checkpoint",
]


def checked_job(folder: Path, shards: ShardSet, tokenizer: Tokenizer) -> TrainingJob:
    model = with_vocabulary(SHAPE, tokenizer.vocab_size)
    batch = {"document_mask": True, "micro_batch_rows": 4, "accumulate": 2}
    return training_job(folder / "run", shards, tokenizer, training_config(model=model, **batch))


@pytest.fixture
def job(text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """A job on text; its processes are this one."""

    def launch_here(module, job_file, on_event, *, ranks, compile_cache):
        try:
            given = PreflightJob.model_validate_json(job_file.read_text(encoding="utf-8"))
            preflight.work(given, stop=lambda: False)
        except Exception as error:
            raise TrainingFailed(str(error), worker._reason(error)) from error

    monkeypatch.setattr(preflight, "launch", launch_here)
    return checked_job(tmp_path, build_shards(SHARDS, *text[:2], tmp_path), text.tokenizer)


@pytest.fixture
def state() -> TrainState:
    return new_state(CONFIG)


def failed(check: Check, *words: str) -> None:
    assert not check.passed, check
    for word in words:
        assert word in f"{check.figure}; {check.sentence}", check


def test_sound_job_passes_every_check_once(job):
    result = preflight.check(job)
    assert [check.name for check in result.checks] == ALL_CHECKS
    assert all(check.passed and check.figure and check.sentence for check in result.checks)
    assert result.passed and apart_from_reuse(result) == preflight.read(job.folder)
    assert {path.name for path in job.run_dir.iterdir() if not path.name.startswith(".")} == {
        "events.jsonl",
        "preflight.json",
        "preflight-job.json",
    }

    assert result.why == "the run had none before"
    same = result.replace(reused=True, why=reuse.PASSED)
    assert preflight.known(job) == same
    longer = job.training.replace(schedule=job.training.schedule.replace(steps=99))
    assert preflight.known(job.replace(training=longer)) == same
    elsewhere = with_workload(job.training, device_name="another CPU")
    assert preflight.known(job.replace(training=elsewhere)) is None
    fewer = with_workload(job.training, micro_batch_rows=2, accumulate=4)
    assert preflight.known(job.replace(training=fewer)) is None


def test_check_that_is_repeated_says_what_changed(job, monkeypatch):
    before = preflight.check(job)
    monkeypatch.setattr(torch, "__version__", "99.0")
    again = preflight.check(job)
    installed = before.identity["torch"]
    assert again.why == f"the one before has torch {installed} instead of 99.0"
    fewer = with_workload(job.training, micro_batch_rows=2, accumulate=4)
    third = preflight.check(job.replace(training=fewer))
    assert "has training.micro_batch_rows 4 instead of 2, training.accumulate 2 inst" in third.why


def test_synthetic_data_has_no_text_to_check(tmp_path):
    synthetic = CorpusConfig(data_mode="synthetic")
    config = TokenizerConfig(tokenizer_name="synthetic", vocab_size=300)
    tokenizer = fetch_tokenizer(config, synthetic, tmp_path)
    job = checked_job(tmp_path, build_shards(SHARDS, synthetic, tokenizer, tmp_path), tokenizer)
    found = list(preflight.data_checks(of(job)))
    assert [check.name for check in found] == ["checksums", "token ids"]
    assert all(check.passed for check in found)


def of(job: TrainingJob) -> PreflightJob:
    same = {name: getattr(job, name) for name in ("run_dir", "training", "shards")}
    return PreflightJob(**same, tokenizer=job.tokenizer, identity={})


def test_checks_of_the_model_leave_it_as_it_was(state):
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    found = list(preflight.model_checks(state, CONFIG))
    assert all(check.passed for check in found)
    assert all(torch.equal(w, before[name]) for name, w in state.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())


@pytest.mark.parametrize("context", [2, 3, 33])
@pytest.mark.parametrize("how", [{"precision": "fp32"}, {"precision": "bf16"}, FP8])
def test_sound_model_passes_at_any_context_and_precision(context, how):
    config = training_config(document_mask=True, seq_len=context, **how)
    found = preflight.model_checks(new_state(config), config)
    assert [check for check in found if not check.passed] == []


@pytest.mark.parametrize("seed", range(5))
def test_initial_loss_is_as_expected_of_wide_models_with_any_seed(seed):
    wide = MODEL.replace(hidden_size=1024, num_hidden_layers=1, vocab_size=2048)
    config = training_config(seed=seed, model=wide, seq_len=64)
    batch = preflight.random_batch(config.workload, seed=seed)
    assert preflight.initial_loss(new_state(config), batch).passed


def test_weights_of_the_wrong_scale_are_caught(state):
    state.model = lively_model()
    failed(preflight.initial_loss(state, BATCH), "expected ln V = 5.545", "`initialize`")


def test_loss_on_the_wrong_scale_is_caught(state):
    wrong = BATCH._replace(valid=BATCH.valid // 2)
    failed(preflight.initial_loss(state, wrong), "nats")


def test_frozen_parameter_is_caught(state):
    state.model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    check = preflight.gradients(state, BATCH)
    failed(check, "19 of 20 parameters", "model.layers.1.mlp.up_proj.weight gets none")


def test_block_cut_off_from_the_graph_is_caught(state):
    block = state.model.model.layers[0].self_attn
    forward = block.forward
    block.forward = lambda *inputs: forward(*inputs).detach()
    failed(preflight.gradients(state, BATCH), "model.layers.0.", "detach()")


def test_gradient_that_is_no_number_is_caught(state):
    state.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    failed(preflight.gradients(state, BATCH), "model.norm.weight")


def test_attention_to_later_tokens_is_caught(state, monkeypatch):
    attend = attention.F.scaled_dot_product_attention

    def blind(*inputs, is_causal, attn_mask, **others):
        return attend(*inputs, is_causal=False, attn_mask=None, **others)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", blind)
    failed(preflight.causality(state, BATCH._replace(documents=None)), "tokens that come later")


def test_attention_to_the_next_token_alone_is_caught(state, monkeypatch):
    def lenient(documents, dtype):
        T = documents.shape[1]
        return torch.ones(T, T, dtype=torch.bool).tril(diagonal=1)

    monkeypatch.setattr(state.model.model, "mask_for", lenient)
    failed(preflight.causality(state, BATCH), "tokens that come later")


def test_model_that_sees_no_token_is_caught(state):
    torch.nn.init.zeros_(state.model.model.embed_tokens.weight)
    failed(preflight.causality(state, BATCH), "no token at all")


def test_attention_to_other_documents_is_caught(state, monkeypatch):
    def blind(documents, dtype):
        return attention.dense_mask(documents * 0, dtype)

    monkeypatch.setattr(state.model.model, "mask_for", blind)
    assert preflight.causality(state, BATCH).passed
    failed(preflight.documents(state, BATCH), "other documents", "drop --document-mask")


def test_compiled_code_that_differs_is_caught(monkeypatch):
    def compiled(state: TrainState) -> TrainState:
        torch.compiler.reset()
        for block in state.model.model.layers:
            block.compile(backend="eager", dynamic=False)  # no C++ compiler in a quick test
        return state

    batch = BATCH._replace(documents=None)
    sound = preflight.compiled_equals_eager(compiled(new_state(CONFIG)), batch, 1e-3)
    assert sound.passed and sound.figure == "0 apart"

    forward = FeedForward.forward

    def other(self, x):
        y = forward(self, x)
        return y * 1.05 if torch.compiler.is_compiling() else y

    monkeypatch.setattr(FeedForward, "forward", other)
    check = preflight.compiled_equals_eager(compiled(new_state(CONFIG)), batch, 1e-3)
    failed(check, "apart", "--no-compile")


def test_micro_batch_that_does_not_fit_is_halved_as_in_training(job, monkeypatch):
    step = preflight.train_step

    def with_room_for_two_rows(state, micro_batches, config):
        if len(micro_batches[0].inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(state, micro_batches, config)

    monkeypatch.setattr(preflight, "train_step", with_room_for_two_rows)
    result = preflight.check(job)
    assert result.passed and "2 rows x 32 tokens fit" in result.checks[-2].figure
    [entry] = recovery.read(job.folder)
    assert entry.micro_batch_rows == 2 and "instead of 4" in entry.action
    trained = recovery.applied(job, [entry]).training.workload
    assert (trained.micro_batch_rows, trained.accumulate) == (2, 4)
    assert preflight.known(job).checks == result.checks


def test_row_that_does_not_fit_says_what_to_change(job, monkeypatch):
    def without_room(state, micro_batches, config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(preflight, "train_step", without_room)
    result = preflight.check(job)
    assert not result.passed and preflight.known(job) is None
    actions = [entry.action for entry in recovery.read(job.folder)]
    assert len(actions) == 3 and "computed again" in actions[-1]
    message = str(PreflightFailed(result))
    assert "micro-batch: 1 row does not fit" in message and "lower --seq-len" in message


def test_step_that_gives_no_finite_number_is_caught(job):
    state = new_state(job.training)
    torch.nn.init.constant_(state.model.model.norm.weight, torch.inf)
    check = preflight.micro_batch(state, job.training, Rows(job.shards, "train"))
    failed(check, "no finite numbers", "--precision")


def test_other_errors_are_told_as_they_are(job, monkeypatch):
    def broken(*inputs):
        raise ValueError("a bug")

    monkeypatch.setattr(preflight, "train_step", broken)
    with pytest.raises(TrainingFailed, match="a bug\nthis was in the pre-flight"):
        preflight.check(job)
    assert recovery.read(job.folder) == []


def test_ids_outside_the_vocabulary_are_caught_and_not_trained_on(job):
    few = job.tokenizer.replace(vocab_size=100)
    result = preflight.check(job.replace(tokenizer=few))
    [ids] = [check for check in result.checks if not check.passed]
    failed(ids, "vocabulary of 100", "another tokenizer", str(job.shards.path))
    names = [check.name for check in result.checks]
    assert "micro-batch" not in names and "text" not in names


def test_ids_of_another_tokenizer_are_caught_by_their_text(job, text, tmp_path):
    numbers = [f"{n * n} {n**3} fünf" for n in range(999)]
    config = TokenizerConfig(tokenizer_name="train", vocab_size=400)
    other = fetch_tokenizer(config, jsonl_corpus(tmp_path / "numbers.jsonl", numbers), tmp_path)
    rows = Rows(job.shards, "train")
    sound = preflight.text(rows, text.tokenizer)
    assert sound.passed and float(sound.figure.removesuffix("%")) > 95
    failed(preflight.text(rows, other), "come back", "zeroflow data")


def test_flipped_byte_of_a_shard_is_caught(job):
    file = next(job.shards.part_paths[0].glob("train-*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = preflight.check(job)
    [check] = [check for check in result.checks if not check.passed]
    failed(check, "a part is damaged", file.name, "sha256 differs", "makes it anew")


def test_checkpoint_comes_back_with_the_same_bits(state, tmp_path):
    for weights in state.optimizer.state.values():
        weights["exp_avg"].normal_()
    before = {name: tensor.clone() for name, tensor in preflight._tensors(state).items()}
    assert preflight.round_trip(state, tmp_path / "saved", "f").passed
    for name, tensor in preflight._tensors(state).items():
        assert torch.equal(tensor, before[name]), name
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_that_forgets_a_moment_is_caught(state, tmp_path, monkeypatch):
    whole = checkpoint._tensors

    def forgetful(state):
        return {name: t for name, t in whole(state).items() if not name.endswith("exp_avg")}

    for weights in state.optimizer.state.values():
        weights["exp_avg"].normal_()
    monkeypatch.setattr(checkpoint, "_tensors", forgetful)
    failed(preflight.round_trip(state, tmp_path / "saved", "f"), "20 tensors, such as exp_avg of")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_damages_what_is_written_is_caught(state, tmp_path, monkeypatch):
    verified = checkpoint.latest

    def damaged(folder):
        file = next(folder.glob("step-*/*.distcp"))
        file.write_bytes(file.read_bytes()[:-1])
        return verified(folder)

    monkeypatch.setattr(checkpoint, "latest", damaged)
    failed(preflight.round_trip(state, tmp_path / "saved", "f"), "look at the disk")


def test_disk_without_room_is_caught(state, tmp_path, monkeypatch):
    usage = type(checkpoint.shutil.disk_usage("."))(100, 99, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage)
    failed(preflight.round_trip(state, tmp_path / "saved", "f"), "has room for", "--cache-dir")


def test_checks_that_passed_in_format_1_are_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", format1.TORCH)
    job = TrainingJob.model_validate(format1.JOB).replace(run_dir=tmp_path)
    passed = {"passed": True, "job": format1.PREFLIGHT, "seconds": 1.5, "checks": []}
    artifacts.write_json(job.folder.preflight, passed)
    known = preflight.known(job)
    assert known is not None and known.reused
