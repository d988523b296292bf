"""The Hopper kernels of the loss beside PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from zeroflow.data.batches import IGNORED
from zeroflow.training import kernels
from zeroflow.training.loss import cross_entropy_sum

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_HOPPER, reason="no Hopper GPU"),
    pytest.mark.skipif(not kernels.has_extra(), reason=f"without {kernels.EXTRA}"),
]


@pytest.mark.parametrize("kernel", ["one_read", "scaled_exp"])
# less than a chunk, and a chunk of 16,256 tokens with a shorter second one
@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(1000, 128_256), (1000, 2048), (20_000, 32_768)]
)
def test_loss_and_gradients_are_those_of_float64(tokens, vocabulary, kernel):
    generator = torch.Generator("cuda").manual_seed(0)
    made = torch.randn(1, tokens, 320, device="cuda", generator=generator)
    hidden = made.to(torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, 320, device="cuda", generator=generator) * 0.1
    weight = weight.to(torch.bfloat16).float().requires_grad_()
    targets = torch.randint(vocabulary, (1, tokens), device="cuda", generator=generator)
    targets[0, :7] = IGNORED

    found = cross_entropy_sum(hidden, weight, targets, kernel=kernel)
    d_hidden, d_weight = torch.autograd.grad(found, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = wide[0][0] @ wide[1].T
    exact = F.cross_entropy(logits, targets[0], ignore_index=IGNORED, reduction="sum")
    d_exact = torch.autograd.grad(exact, wide)
    # one_read computes from logits that are rounded to bf16, and one was 1.0e-5 apart
    limit = 1e-5 if kernel == "scaled_exp" else 5e-5
    assert found.double().item() == pytest.approx(exact.item(), rel=limit)
    # bf16 has 8 bits, and the exponentials and their scales are rounded one after the other
    assert (d_hidden.double() - d_exact[0]).norm() < 8e-3 * d_exact[0].norm()
    assert (d_weight.double() - d_exact[1]).norm() < 8e-3 * d_exact[1].norm()
    assert not d_hidden[0, :7].any(), "ignored targets"


@pytest.mark.parametrize("kernel", ["one_read", "scaled_exp"])
def test_loss_has_the_same_bits_each_time(kernel):
    generator = torch.Generator("cuda").manual_seed(0)
    made = torch.randn(1, 20_000, 320, device="cuda", generator=generator)
    hidden = made.to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(32_768, 320, device="cuda", generator=generator) * 0.1).requires_grad_()
    targets = torch.randint(32_768, (1, 20_000), device="cuda", generator=generator)

    def once() -> list[torch.Tensor]:
        loss = cross_entropy_sum(hidden, weight, targets, kernel=kernel)
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    first = once()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))
