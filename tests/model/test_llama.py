import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny import MODEL, QWEN3, SHAPE, lively_model
from torch.utils.flop_counter import FlopCounterMode

from zeroflow.model.llama import Llama, Shape, initialize, rotary_angles, rotate


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(MODEL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def fresh(seed: int) -> dict[str, torch.Tensor]:
    model = Llama(MODEL)
    initialize(model, seed)
    return model.state_dict()


def test_every_token_gets_logits_over_the_vocabulary_and_every_parameter_a_gradient():
    model = lively_model()
    tokens = random_tokens(3, 7)
    logits = model(tokens)
    assert logits.shape == (3, 7, MODEL.vocab_size)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_head_gets_the_hidden_states_and_the_embedding():
    model = lively_model()
    tokens = random_tokens(2, 5)

    def head(hidden, weight):
        assert hidden.shape == (2, 5, MODEL.hidden_size)
        assert weight is model.model.embed_tokens.weight
        return F.linear(hidden, weight)

    assert torch.equal(model(tokens, head), model(tokens))


def test_future_token_changes_no_bit_of_past_logits():
    model = lively_model()
    before = random_tokens(1, 12)
    after = before.clone()
    after[0, 8] = (after[0, 8] + 1) % MODEL.vocab_size
    changed = (model(before) != model(after)).any(-1)[0]
    assert not changed[:8].any()
    assert changed[8:].all()


def test_rotation_preserves_the_norm_of_every_feature_pair():
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rotary_angles(torch.arange(50), 8, 10_000.0))
    pairs = x.unflatten(-1, (2, 4)).norm(dim=-2)
    # rounding of one multiplication and addition in fp32, at values of about 1
    torch.testing.assert_close(turned.unflatten(-1, (2, 4)).norm(dim=-2), pairs, atol=1e-6, rtol=0)
    assert not torch.allclose(turned[:, :, 1:], x[:, :, 1:])
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_rotated_scores_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 16, generator=generator) for _ in range(2))

    def score(query_position: int, key_position: int) -> float:
        angles = [
            rotary_angles(torch.tensor([position]), 16, 10_000.0)
            for position in (query_position, key_position)
        ]
        return float((rotate(query, *angles[0]) * rotate(key, *angles[1])).sum())

    # fp32 holds an angle of 1000 to 6e-5, which is what the scores can differ by
    for shift in (1, 10, 1000):
        assert score(9 + shift, 4 + shift) == pytest.approx(score(9, 4), abs=1e-3)
    assert score(9, 5) != pytest.approx(score(9, 4), abs=1e-2)


def test_rotation_keeps_the_dtype_of_its_input():
    x = torch.ones(1, 1, 3, 8, dtype=torch.bfloat16)
    assert rotate(x, *rotary_angles(torch.arange(3), 8, 1e4)).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **MODEL.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def test_parameters_are_named_as_in_hugging_face(hugging_face):
    theirs = {name: tensor.shape for name, tensor in hugging_face.state_dict().items()}
    del theirs["lm_head.weight"]  # tied: the embedding by another name
    assert {name: tensor.shape for name, tensor in Llama(MODEL).state_dict().items()} == theirs
    assert not list(Llama(MODEL).buffers())


def test_logits_equal_those_of_hugging_face_on_the_same_weights(hugging_face):
    model, tokens = lively_model(), random_tokens(2, 40)
    hugging_face.load_state_dict(model.state_dict(), strict=False)
    ours, theirs = model(tokens), hugging_face(tokens).logits
    # the same sums in another order: fp32 rounding at logits of about 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.std() > 0.5

    # Meta's own order of the features, pairs side by side, would give another model
    interleaved = model.state_dict() | {
        name: weight.unflatten(0, (-1, 2, MODEL.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        for name, weight in model.state_dict().items()
        if name.endswith(("q_proj.weight", "k_proj.weight"))
    }
    hugging_face.load_state_dict(interleaved, strict=False)
    assert (hugging_face(tokens).logits - ours).abs().max() > 1e-2


@pytest.mark.parametrize("config", [MODEL, QWEN3], ids=["llama", "qwen3"])
def test_flops_equal_those_that_pytorch_counts(config):
    model, rows, context = Llama(config), 2, 16
    with FlopCounterMode(display=False) as counter:
        model(random_tokens(rows, context)).sum().backward()
    matrices = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert matrices == rows * context * (config.flops_per_token(0) - 6 * norms)


@pytest.mark.parametrize(("config", "features"), [(MODEL, 32), (QWEN3, 48)], ids=["llama", "qwen3"])
def test_attention_flops_are_half_of_the_full_square(config, features):
    C, L = 512, config.num_hidden_layers
    square = 3 * 2 * (2 * C * C * features)  # forward, and twice that backward; scores and values
    assert config.flops_per_token(C) - config.flops_per_token(0) == L * square // 2 // C


def test_closed_form_counts_the_norms_of_queries_and_keys():
    model = Llama(QWEN3)
    assert sum(p.numel() for p in model.parameters()) == QWEN3.parameters
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert block == QWEN3.block_parameters


def test_initial_weights_have_the_promised_deviation():
    config = MODEL.replace(vocab_size=4096, hidden_size=128, num_hidden_layers=8)
    model = Llama(config)
    initialize(model, 0)
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / (2 * 8) ** 0.5 if residual else 0.02
        # the std of n samples has a standard error of std / sqrt(2n): allow five of them
        allowed = 5 / (2 * weight.numel()) ** 0.5
        assert float(weight.std()) == pytest.approx(std, rel=allowed), name
        assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5, name


def test_initial_weights_depend_on_the_seed_only():
    torch.manual_seed(1)
    first = fresh(seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = fresh(seed=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    model = Llama(MODEL)
    torch.set_rng_state(state)
    initialize(model, 3)
    assert torch.equal(torch.get_rng_state(), state)
    other = fresh(seed=4)
    for name, weight in first.items():
        assert torch.equal(weight, other[name]) == name.endswith("norm.weight"), name


def test_no_two_matrices_start_with_the_same_weights():
    matrices = [weight for weight in fresh(seed=3).values() if weight.dim() == 2]
    beginnings = {tuple((weight / weight.std()).flatten()[:8].tolist()) for weight in matrices}
    assert len(beginnings) == len(matrices)


def test_initial_weights_do_not_depend_on_other_parameters():
    whole = fresh(seed=3)
    part = Llama(MODEL)
    del part.model.layers[1]
    part.model.layers[0]._modules = dict(reversed(part.model.layers[0]._modules.items()))
    initialize(part, 3)
    for name, weight in part.state_dict().items():
        assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "--hidden-size 32 cannot be divided among 5 query heads"),
        (
            {"num_attention_heads": 32, "num_key_value_heads": 1},
            "= 1 feature per head.*even number",
        ),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hiden_size": 32}, "hiden_size"),
    ],
)
def test_impossible_shape_is_refused_with_its_reason(change, message):
    with pytest.raises(ValidationError, match=message):
        Shape(**SHAPE.model_dump() | change)
