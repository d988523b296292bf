import pytest
import torch
import torch.nn.functional as F
from tiny import DEVICES

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
    monkeypatch.setattr(loss, "logits_bytes", lambda memory: 4 * chunk * V)
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


def test_chunks_smaller_than_a_vocabulary_still_have_one_token(monkeypatch):
    monkeypatch.setattr(loss, "logits_bytes", lambda memory: 1)
    torch.testing.assert_close(cross_entropy_sum(*example()), plain(*example()))


def test_logits_of_the_whole_batch_are_never_in_memory(monkeypatch):
    monkeypatch.setattr(loss, "logits_bytes", lambda memory: 16 * V)
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


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.T).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    valid = targets.flatten() != IGNORED
    loss = loss + z_loss * logits.logsumexp(dim=1)[valid].square().sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


# an odd vocabulary, and on the GPU one of almost four of the kernel's blocks
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_as_close_to_the_true_ones_as_their_type_allows(
    monkeypatch, device, dtype, limit, z_loss
):
    vocabulary, features, tokens = (1_001, 64, 96) if device == "cpu" else (128_256, 512, 4_096)
    held = vocabulary * (tokens // 3 + 1) * dtype.itemsize
    monkeypatch.setattr(loss, "logits_bytes", lambda memory: held)
    generator = torch.Generator().manual_seed(0)
    # as large as a trained model's: hidden states of about 1, logits of some units
    hidden = torch.randn(2, tokens // 2, features, generator=generator)
    weight = torch.randn(vocabulary, features, generator=generator) / features**0.5
    targets = torch.randint(vocabulary, (2, tokens // 2), generator=generator)
    targets[0, :3] = torch.tensor([0, vocabulary - 1, IGNORED])
    targets[1, -1] = IGNORED
    hidden = hidden.to(device, dtype).requires_grad_()
    weight = weight.to(dtype).to(device, torch.float32).requires_grad_()  # master weights
    targets = targets.to(device)

    ours = cross_entropy_sum(hidden, weight, targets, z_loss)
    ours.backward()
    expected, d_hidden, d_weight = exact(hidden, weight, targets, z_loss)
    assert ours.item() == pytest.approx(float(expected), rel=limit / 10)
    assert hidden.grad.dtype == dtype and weight.grad.dtype == torch.float32
    assert error(hidden.grad, d_hidden) < limit
    assert error(weight.grad, d_weight) < limit
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(hidden, weight, targets, z_loss), ours)


def test_gradient_of_the_loss_is_passed_on():
    hidden, weight, targets = example()
    (3 * cross_entropy_sum(hidden, weight, targets)).backward()
    theirs = torch.autograd.grad(3 * plain(hidden, weight, targets), (hidden, weight))
    torch.testing.assert_close(hidden.grad, theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad, theirs[1], atol=1e-5, rtol=1e-5)
