import pytest
import torch
from tiny import MODEL, RandomBatches, lively_model, training_config

from zeroflow.model.llama import Llama
from zeroflow.training.loop import train
from zeroflow.training.optimizers import adamw as optimizers
from zeroflow.training.optimizers.adamw import OptimizerConfig
from zeroflow.training.state import new_state


def test_matrices_decay_norms_and_embeddings_do_not():
    model = Llama(MODEL)
    optimizer = optimizers.build(model, OptimizerConfig(weight_decay=0.3), 1e-3)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = "norm" in name or "embed" in name
        assert decay[parameter] == (0.0 if spared else 0.3), name


def test_moments_are_there_before_the_first_step():
    model = Llama(MODEL)
    optimizer = optimizers.build(model, OptimizerConfig(), 1e-3)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 0
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_steps_equal_those_of_plain_adamw():
    config = OptimizerConfig(beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.2)
    ours, theirs = lively_model(), lively_model()
    optimizer = optimizers.build(ours, config, 1e-2)
    matrices = {n for n, p in theirs.named_parameters() if p.dim() == 2 and "embed" not in n}
    plain = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.named_parameters() if n in matrices]},
            {
                "params": [p for n, p in theirs.named_parameters() if n not in matrices],
                "weight_decay": 0.0,
            },
        ],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.2,
        fused=False,
        foreach=False,
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizers.set_learning_rate(optimizer, 1e-2 / (step + 1))
        for group in plain.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        plain.step()
    before = lively_model().state_dict()
    for name, weight in ours.state_dict().items():
        # the fused kernel rounds its intermediate values differently, in the last bits of fp32
        torch.testing.assert_close(weight, theirs.state_dict()[name], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(weight, before[name], atol=1e-3), name


def test_learning_rate_is_set_for_every_parameter():
    optimizer = optimizers.build(Llama(MODEL), OptimizerConfig(), 1e-3)
    optimizers.set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_update_ratio_is_that_of_the_update_that_was_made():
    config = training_config(optimizer=OptimizerConfig(weight_decay=0.0))
    state = new_state(MODEL, config)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    next(train(state, RandomBatches(), config))
    ratios = [
        float((p.detach() - before[name]).norm() / p.detach().norm())
        for name, p in state.model.named_parameters()
        if p.dim() == 2 and "embed" not in name
    ]
    # the difference of two nearly equal weights has fewer digits
    assert float(optimizers.update_ratio(state.optimizer)) == pytest.approx(max(ratios), rel=1e-3)
