"""The Hopper kernels beside the same in float64; they run where their packages and GPU are."""

import pytest
import torch

from zeroflow.model import hopper
from zeroflow.model.attention import attend
from zeroflow.model.llama import swiglu
from zeroflow.training import kernels

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_HOPPER, reason="no Hopper GPU"),
    pytest.mark.skipif(not kernels.has_extra(), reason=f"without {kernels.EXTRA}"),
]


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    made = torch.randn(*shape, device="cuda", generator=generator).mul_(scale)
    return made.to(torch.bfloat16).requires_grad_()


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a fixed weighted sum of `y`; the weights are the same in every dtype."""
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape)
    return list(torch.autograd.grad(y, inputs, weights.to(torch.bfloat16).to(y.dtype)))


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    # Relative to the norm. bf16 has 8 bits, and products round once more between kernels
    assert (found.double() - exact).norm() < 8e-3 * exact.norm()


def in_float64(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "features"), [(32, 8, 64), (18, 6, 64), (6, 2, 96), (4, 1, 128)]
)
def test_attention_and_its_gradients_are_those_of_float64(heads, kv_heads, features, compiled):
    joined = random(2, 384, heads + 2 * kv_heads, features)

    def run(joined: torch.Tensor, kernel: str) -> torch.Tensor:
        q, k, v = joined.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
        return attend(q, k, v, kernel=kernel)

    ours = torch.compile(run, dynamic=False) if compiled else run
    [exact_input] = in_float64([joined])
    found, exact = ours(joined, "flash4"), run(exact_input.cpu(), "cudnn").cuda()
    assert_close(found, exact)
    [d_found], [d_exact] = gradients(found, [joined]), gradients(exact, [exact_input])
    assert_close(d_found, d_exact)


def test_attention_with_a_gradient_is_deterministic_if_asked():
    joined = random(4, 2048, 18 + 12, 64)

    def gradient() -> torch.Tensor:
        q, k, v = joined.transpose(1, 2).split((18, 6, 6), dim=1)
        return gradients(hopper.attend(q, k, v), [joined])[0]

    torch.use_deterministic_algorithms(True)
    try:
        first = gradient()
        assert all(torch.equal(first, gradient()) for _ in range(10))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("features", "inside"), [(320, 1024), (1152, 3072), (2048, 5632)])
def test_feed_forward_and_its_gradients_are_those_of_float64(features, inside, compiled):
    shapes = ((inside, features), (inside, features), (features, inside))
    inputs = [random(2, 200, features), *(random(*shape, scale=0.02) for shape in shapes)]
    ours = torch.compile(hopper.swiglu, dynamic=False) if compiled else hopper.swiglu
    exact_inputs = in_float64(inputs)
    found, exact = ours(*inputs), swiglu(*exact_inputs)
    assert_close(found, exact)
    pairs = zip(gradients(found, inputs), gradients(exact, exact_inputs), strict=True)
    for d_found, d_exact in pairs:
        assert_close(d_found, d_exact)


def test_feed_forward_has_the_same_bits_each_time():
    shapes = ((3072, 1152), (3072, 1152), (1152, 3072))
    inputs = [random(4, 2048, 1152), *(random(*shape, scale=0.02) for shape in shapes)]
    first = gradients(hopper.swiglu(*inputs), inputs)
    again = gradients(hopper.swiglu(*inputs), inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
