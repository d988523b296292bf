"""Checks of the model, on sound models and on broken ones."""

import pytest
import torch
from checked import assert_failed
from tiny import MODEL, lively_model, training_config

from zeroflow.checks import model_checks
from zeroflow.model import attention
from zeroflow.model.llama import FeedForward
from zeroflow.training.state import TrainState, new_state

CONFIG = training_config(document_mask=True, seq_len=64)
FP8 = {"precision": "bf16", "fp8": True}
BATCH = model_checks.random_batch(CONFIG.workload, seed=0)


@pytest.fixture
def state() -> TrainState:
    return new_state(CONFIG)


def test_checks_leave_the_model_as_it_was(state):
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    found = list(model_checks.checks(state, CONFIG))
    assert all(check.passed for check in found)
    assert all(torch.equal(w, before[name]) for name, w in state.model.state_dict().items())
    assert all(parameter.grad is None for parameter in state.model.parameters())


@pytest.mark.parametrize("context", [2, 3, 33])
@pytest.mark.parametrize("how", [{"precision": "fp32"}, {"precision": "bf16"}, FP8])
def test_sound_model_passes_at_any_context_and_precision(context, how):
    config = training_config(document_mask=True, seq_len=context, **how)
    found = model_checks.checks(new_state(config), config)
    assert [check for check in found if not check.passed] == []


@pytest.mark.parametrize("seed", range(5))
def test_initial_loss_of_wide_models_is_as_expected_with_any_seed(seed):
    wide = MODEL.replace(hidden_size=1024, num_hidden_layers=1, vocab_size=2048)
    config = training_config(seed=seed, model=wide, seq_len=64)
    batch = model_checks.random_batch(config.workload, seed=seed)
    assert model_checks.initial_loss(new_state(config), batch).passed


@pytest.mark.parametrize("vocab_size", [128, 384])
@pytest.mark.parametrize(
    ("hidden", "layers", "intermediate"), [(1024, 1, 64), (320, 1, 1), (2048, 1, 1), (1024, 3, 8)]
)
def test_initial_loss_of_odd_shapes_is_as_expected_unless_weights_have_the_wrong_scale(
    hidden, layers, intermediate, vocab_size
):
    odd = MODEL.replace(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
    )
    config = training_config(model=odd, seq_len=64, micro_batch_rows=1)
    batch = model_checks.random_batch(config.workload, seed=0)
    state = new_state(config)
    assert model_checks.initial_loss(state, batch).passed
    state.model = lively_model(odd)
    assert_failed(model_checks.initial_loss(state, batch), "`initialize`")


def test_weights_of_the_wrong_scale_are_caught(state):
    state.model = lively_model()
    assert_failed(model_checks.initial_loss(state, BATCH), "ln V = 5.545", "`initialize`")


def test_loss_on_the_wrong_scale_is_caught(state):
    wrong = BATCH._replace(valid=BATCH.valid // 2)
    assert_failed(model_checks.initial_loss(state, wrong), "nats")


def test_frozen_parameter_is_caught(state):
    state.model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    check = model_checks.gradients(state, BATCH)
    assert_failed(check, "19 of 20 parameters", "model.layers.1.mlp.up_proj.weight is missing")


def test_block_cut_off_from_the_graph_is_caught(state):
    block = state.model.model.layers[0].self_attn
    forward = block.forward
    block.forward = lambda *inputs: forward(*inputs).detach()
    assert_failed(model_checks.gradients(state, BATCH), "model.layers.0.", "detach()")


def test_non_finite_gradient_is_caught(state):
    state.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    assert_failed(model_checks.gradients(state, BATCH), "model.norm.weight")


def test_attention_to_later_tokens_is_caught(state, monkeypatch):
    attend = attention.F.scaled_dot_product_attention

    def blind(*inputs, is_causal, attn_mask, **others):
        return attend(*inputs, is_causal=False, attn_mask=None, **others)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", blind)
    assert_failed(model_checks.causality(state, BATCH._replace(documents=None)), "later tokens")


def test_attention_to_the_next_token_only_is_caught(state, monkeypatch):
    def lenient(documents, dtype):
        T = documents.shape[1]
        return torch.ones(T, T, dtype=torch.bool).tril(diagonal=1)

    monkeypatch.setattr(state.model.model, "mask_for", lenient)
    assert_failed(model_checks.causality(state, BATCH), "later tokens")


def test_model_that_ignores_its_tokens_is_caught(state):
    torch.nn.init.zeros_(state.model.model.embed_tokens.weight)
    assert_failed(model_checks.causality(state, BATCH), "do not depend on any token")


def test_attention_to_other_documents_is_caught(state, monkeypatch):
    def blind(documents, dtype):
        return attention.dense_mask(documents * 0, dtype)

    monkeypatch.setattr(state.model.model, "mask_for", blind)
    assert model_checks.causality(state, BATCH).passed
    assert_failed(model_checks.documents(state, BATCH), "other documents", "drop --document-mask")


def test_compiled_code_that_differs_is_caught(monkeypatch):
    def compiled(state: TrainState) -> TrainState:
        torch.compiler.reset()
        for block in state.model.model.layers:
            block.compile(backend="eager", dynamic=False)  # a quick test needs no C++ compiler
        return state

    batch = BATCH._replace(documents=None)
    sound = model_checks.compiled_equals_eager(compiled(new_state(CONFIG)), batch, 1e-3)
    assert sound.passed and sound.figure == "relative difference 0"

    forward = FeedForward.forward

    def other(self, x):
        y = forward(self, x)
        return y * 1.05 if torch.compiler.is_compiling() else y

    monkeypatch.setattr(FeedForward, "forward", other)
    check = model_checks.compiled_equals_eager(compiled(new_state(CONFIG)), batch, 1e-3)
    assert_failed(check, "relative difference", "--no-compile")
