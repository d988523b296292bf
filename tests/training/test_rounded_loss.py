"""The loss with products in 8 bits, compared with float64."""

import pytest
import torch
import torch.nn.functional as F
from rounding import OFF_GRADIENTS, error
from tiny import DEVICES

from zeroflow.data.batches import IGNORED
from zeroflow.training import loss
from zeroflow.training.loss import cross_entropy_sum

T, D, V = 96, 64, 1_008

SLACK = 1.15


def example(device: str, vocabulary: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # as large as a trained model's: hidden states of about 1, logits of a few units
    hidden = torch.randn(2, T // 2, D, generator=generator)
    weight = torch.randn(vocabulary, D, generator=generator) * 2 / D**0.5
    targets = torch.randint(vocabulary, (2, T // 2), generator=generator)
    targets[0, :3] = torch.tensor([0, vocabulary - 1, IGNORED])
    targets[1, -1] = IGNORED
    hidden = hidden.to(device, torch.bfloat16).requires_grad_()
    return hidden, weight.to(device).requires_grad_(), targets.to(device)


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> list[torch.Tensor]:
    """Loss and gradients in float64."""
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = (wide[0] @ wide[1].T).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    valid = targets.flatten() != IGNORED
    total = total + z_loss * logits.logsumexp(dim=1)[valid].square().sum()
    return [total.detach(), *torch.autograd.grad(total, wide)]


# the second vocabulary has more than one block of the kernel; neither is a multiple of its tile
@pytest.mark.parametrize(("vocabulary", "chunk"), [(V, 32), (V, 10 * T), (36_880, 80)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_have_the_rounding_error_of_fp8(
    monkeypatch, device, z_loss, chunk, vocabulary
):
    # a token of a chunk takes four bytes for each word of the vocabulary
    monkeypatch.setattr(loss, "logits_bytes", lambda memory: 4 * chunk * vocabulary)
    hidden, weight, targets = example(device, vocabulary)
    found = cross_entropy_sum(hidden, weight, targets, z_loss, "rounded")
    d_hidden, d_weight = torch.autograd.grad(found, (hidden, weight))
    total, *gradients = exact(hidden, weight, targets, z_loss)
    # a logit is off by 0.037 of some units, and 94 tokens average it out
    assert found.item() == pytest.approx(total.item(), rel=5e-3)
    assert (d_hidden.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)
    # the logits' errors are relative errors of the probabilities, beside that of rounding those
    assert error(d_hidden, gradients[0]) < SLACK * OFF_GRADIENTS
    assert error(d_weight, gradients[1]) < SLACK * OFF_GRADIENTS
    assert not d_hidden[targets == IGNORED].any()


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_deterministic_and_chunks_change_only_rounding(monkeypatch, device):
    hidden, weight, targets = example(device)

    def results(chunk: int) -> list[torch.Tensor]:
        monkeypatch.setattr(loss, "logits_bytes", lambda memory: 4 * chunk * V)
        total = cross_entropy_sum(hidden, weight, targets, kernel="rounded")
        return [total, *torch.autograd.grad(total, (hidden, weight))]

    whole = results(T)
    assert all(torch.equal(*pair) for pair in zip(whole, results(T), strict=True))
    # A GPU multiplies a chunk of another size with another kernel. Logits then differ in the last
    # bit of bf16, and some of their gradients are rounded to the next value of fp8
    limit = 1e-6 if device == "cpu" else 2e-2
    for mine, theirs in zip(results(16), whole, strict=True):
        assert error(mine, theirs) < limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_non_finite_hidden_states_give_a_non_finite_loss(device, value):
    hidden, weight, targets = example(device)
    with torch.no_grad():
        hidden[1, 5, 7] = value
    assert not cross_entropy_sum(hidden, weight, targets, kernel="rounded").isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_of_any_magnitude_have_accurate_gradients(device):
    hidden, weight, targets = example(device)
    with torch.no_grad():
        hidden[0] *= 2**-12
    found = cross_entropy_sum(hidden, weight, targets, kernel="rounded")
    d_hidden, _ = torch.autograd.grad(found, (hidden, weight))
    _, expected, _ = exact(hidden, weight, targets, 0.0)
    for row in range(2):
        # All tokens have nearly the same probabilities, so their errors average out less
        assert error(d_hidden[row], expected[row]) < 1.5 * OFF_GRADIENTS
