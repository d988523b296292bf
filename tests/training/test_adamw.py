import torch
from tiny import MODEL, lively_model

from zeroflow.model.llama import Llama
from zeroflow.training.optimizers.adamw import AdamW


def test_matrices_decay_norms_and_embeddings_do_not():
    model = Llama(MODEL)
    optimizer = AdamW(weight_decay=0.3).build(model, 1e-3)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = "norm" in name or "embed" in name
        assert decay[parameter] == (0.0 if spared else 0.3), name


def test_moments_are_zero_before_the_first_step():
    model = Llama(MODEL)
    optimizer = AdamW().build(model, 1e-3)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"], "names in a checkpoint"
        assert not any(value.any() for value in state.values())


def test_name_is_not_written_as_files_of_earlier_versions_have_none():
    fields = ("beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm")
    assert AdamW().model_dump() == {name: getattr(AdamW(), name) for name in fields}


def test_steps_equal_those_of_plain_adamw():
    config = AdamW(beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.2)
    ours, theirs = lively_model(), lively_model()
    optimizer = config.build(ours, 1e-2)
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
        config.set_learning_rate(optimizer, 1e-2 / (step + 1))
        for group in plain.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        config.step(optimizer, skip=torch.tensor(False))
        plain.step()
    before = lively_model().state_dict()
    for name, weight in ours.state_dict().items():
        # the fused kernel rounds its intermediate values differently, in the last bits of fp32
        torch.testing.assert_close(weight, theirs.state_dict()[name], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(weight, before[name], atol=1e-3), name
