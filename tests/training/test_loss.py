import pytest
import torch
import torch.nn.functional as F

from zeroflow.training import loss
from zeroflow.training.loss import IGNORED, cross_entropy_sum

B, T, D, V = 3, 7, 8, 50


def example(*, ignored: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    targets = torch.randint(V, (B, T), generator=generator)
    targets.flatten()[:ignored] = IGNORED
    return hidden, weight, targets


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


# chunks of one token, of some with a shorter last one, of exactly all, of more than all
@pytest.mark.parametrize("chunk", [1, 4, B * T, 10 * B * T])
@pytest.mark.parametrize("ignored", [0, 5, B * T])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(monkeypatch, chunk, ignored):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", chunk * V)
    hidden, weight, targets = example(ignored=ignored)
    ours = cross_entropy_sum(hidden, weight, targets)
    gradients = torch.autograd.grad(ours, (hidden, weight))

    expected = plain(hidden, weight, targets)
    # the same terms summed in another order, in fp32
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-6)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert (ours > 0) == (ignored < B * T)


def test_chunks_smaller_than_a_vocabulary_still_hold_a_token(monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 1)
    torch.testing.assert_close(cross_entropy_sum(*example()), plain(*example()))


def test_logits_of_the_whole_batch_are_never_held(monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 4 * V)
    held = []

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        cross_entropy_sum(*example()).backward()
    assert max(held) <= max(4 * V, V * D, B * T * D)
    assert max(held) < B * T * V


def test_loss_is_summed_in_fp32_from_bf16_inputs():
    hidden, weight, targets = example()
    ours = cross_entropy_sum(hidden.bfloat16(), weight.bfloat16(), targets)
    assert ours.dtype == torch.float32
    # the inputs have 8 bits: each logit of about 3 is off by some 0.02, and 21 of them are summed
    assert ours.item() == pytest.approx(plain(hidden, weight, targets).item(), abs=1.0)
