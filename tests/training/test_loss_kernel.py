"""The kernel of the loss, compared with float64. Without a GPU, plain PyTorch is tested instead."""

import pytest
import torch
import torch.nn.functional as F
from tiny import DEVICES

from zeroflow.data.batches import IGNORED
from zeroflow.training.loss import cross_entropy_sum, has_kernel

ROWS = 37


def exact(
    logits: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the rows, and the gradient of their sum with respect to `logits`, in float64."""
    logits = logits.double().cpu().requires_grad_()
    targets = targets.cpu()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    losses = losses + z_loss * logits.logsumexp(dim=1).square() * (targets != IGNORED)
    [gradient] = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), gradient


# a vocabulary of one block of the kernel, of almost one, of several with a shorter last one
@pytest.mark.parametrize("vocabulary", [50, 32_768, 32_769, 128_256])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_losses_and_gradients_are_those_of_float64(device, dtype, z_loss, vocabulary):
    from zeroflow.training import loss_kernel  # Triton comes with PyTorch's builds for GPUs

    generator = torch.Generator().manual_seed(0)
    # rows of a larger matrix: their stride is not their length
    wide = 5 * torch.randn(ROWS, vocabulary + 3, generator=generator)
    logits = wide.to(device, dtype)[:, :vocabulary]
    targets = torch.randint(vocabulary, (ROWS,), generator=generator).to(device)
    targets[:3] = torch.tensor([0, vocabulary - 1, IGNORED])
    beside = wide.to(device, dtype)[:, vocabulary:].clone()
    losses, gradients = exact(logits, targets, z_loss)

    ours = torch.empty(ROWS, device=device)
    kept = torch.empty(ROWS, vocabulary + 3, device=device, dtype=dtype)
    kept[:, :vocabulary], kept[:, vocabulary:] = logits, beside
    loss_kernel.to_losses_and_gradients(kept[:, :vocabulary], targets, ours, z_loss)
    torch.testing.assert_close(ours.cpu().double(), losses, rtol=1e-5, atol=1e-5)
    assert ours[2] == 0 and not kept[2, :vocabulary].any(), "an ignored target"
    found = kept[:, :vocabulary].cpu().double()
    limit = 2e-6 if dtype == torch.float32 else 4e-3  # bf16 has 8 bits
    assert (found - gradients).norm() < limit * gradients.norm()
    assert torch.equal(kept[:, vocabulary:], beside), "nothing beside the rows is written"


@pytest.mark.parametrize("device", DEVICES[1:])
def test_huge_logits_give_finite_losses(device):
    from zeroflow.training import loss_kernel

    logits = torch.full((2, 40_000), -1e5, device=device)
    logits[0, :2] = torch.tensor([1e4, 1e4 - 1])
    logits[1, 39_999] = -1e4
    losses = torch.empty(2, device=device)
    targets = torch.tensor([1, 39_999], device=device)
    loss_kernel.to_losses_and_gradients(logits, targets, losses, 0.0)
    # fp32 keeps steps of 1e-3 at 1e4
    assert losses.tolist() == pytest.approx([1.313262, 0.0], abs=1e-3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("device", DEVICES[1:])
def test_kernel_is_used_if_possible_and_equals_plain_code(device, monkeypatch):
    from zeroflow.training import loss, loss_kernel

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 64, generator=generator).to(device)
    weight = torch.randn(1_000, 64, generator=generator).to(device)
    targets = torch.randint(1_000, (2, 9), generator=generator).to(device)
    assert has_kernel(hidden.device)
    calls = []
    kernel = loss_kernel.to_losses_and_gradients
    monkeypatch.setattr(
        loss_kernel, "to_losses_and_gradients", lambda *given: calls.append(1) or kernel(*given)
    )
    ours = cross_entropy_sum(hidden, weight, targets)
    assert calls
    monkeypatch.setattr(loss, "has_kernel", lambda device: False)
    plain = cross_entropy_sum(hidden, weight, targets)
    # the same terms in another order, in fp32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
