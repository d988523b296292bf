"""The fused feed-forward network in fp8, beside fp32; on a CPU, its kernels are plain PyTorch."""

from functools import partial

import pytest
import torch
from rounding import OFF_GRADIENTS, OFF_VALUES, error
from tiny import DEVICES

from zeroflow.model import fp8, llama

D, M = 64, 96


def inputs(device: str, tokens: int = 96) -> list[torch.Tensor]:
    """Return tokens of growing magnitude, and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens // 2, D, generator=generator)
    x *= torch.logspace(-1, 1, tokens // 2)[:, None]
    shapes = ((M, D), (M, D), (D, M))
    weights = [0.2 * torch.randn(*shape, generator=generator) for shape in shapes]
    # rounded, so that the values in fp32 are the same
    return [
        x.bfloat16().to(device).requires_grad_(),
        *(w.to(device).requires_grad_() for w in weights),
    ]


def gradients(function, given: list[torch.Tensor]) -> list[torch.Tensor]:
    y = function(*given)
    generator = torch.Generator().manual_seed(1)
    dy = 1e-7 * torch.randn(y.shape, generator=generator).to(y)
    return [y, *torch.autograd.grad(y, given, dy)]


@pytest.mark.parametrize("tokens", [96, 8192], ids=["all sampled", "some sampled"])
@pytest.mark.parametrize("device", DEVICES)
def test_results_have_the_rounding_error_of_separate_products_in_fp8(device, tokens):
    given = inputs(device, tokens)
    wide = [t.detach().float().requires_grad_() for t in given]
    exact = gradients(llama.swiglu, wide)
    separate = gradients(partial(llama.swiglu, product=fp8.linear), given)
    fused = gradients(fp8.swiglu, given)
    names = ("y", "dx", "d_gate", "d_up", "d_down")
    for name, mine, theirs, true in zip(names, fused, separate, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        # two or three products, one after the other
        assert error(mine, true) < 2.2 * (OFF_VALUES if name == "y" else OFF_GRADIENTS), name
        assert error(mine, true) < 1.05 * error(theirs, true), name


@pytest.mark.parametrize("device", DEVICES)
def test_no_token_changes_the_result_of_another(device):
    given = inputs(device)
    before = fp8.swiglu(*given)
    with torch.no_grad():
        given[0][1, 7] *= 8
    changed = (fp8.swiglu(*given) != before).any(-1)
    assert changed.nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_deterministic(device):
    given = inputs(device, 8192)
    first, again = (gradients(fp8.swiglu, given) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_beyond_the_sampled_range_are_clipped(device):
    given = inputs(device, 8192)
    y = fp8.swiglu(*given)
    dy = torch.full_like(y, 1e-7)
    dy[0, 1] = 1.0  # not in the sample, and more than HEADROOM times as large
    result = torch.autograd.grad(y, given, dy)
    assert all(gradient.isfinite().all() for gradient in result)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("device", DEVICES)
def test_non_finite_values_reach_the_result_and_the_gradients(device, value):
    given = inputs(device, 8192)
    with torch.no_grad():
        given[0][0, 3, 5] = value
    y = fp8.swiglu(*given)
    assert not y[0, 3].isfinite().any() and y[1].isfinite().all()
    given = inputs(device, 8192)
    y = fp8.swiglu(*given)
    dy = torch.full_like(y, 1e-7)
    dy[0, 1] = value
    _, *of_weights = torch.autograd.grad(y, given, dy)
    assert not any(gradient.isfinite().all() for gradient in of_weights)


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_give_zeros(device):
    given = inputs(device)
    with torch.no_grad():
        given[0][1] = 0
    y, *result = gradients(fp8.swiglu, given)
    assert not y[1].any() and all(gradient.isfinite().all() for gradient in result)
    y = fp8.swiglu(*given)
    assert not any(g.any() for g in torch.autograd.grad(y, given, torch.zeros_like(y)))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_network_is_one_graph_with_the_same_results(device):
    given = inputs(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(fp8.swiglu, fullgraph=True, dynamic=False, backend=backend)
    pairs = zip(gradients(compiled, given), gradients(fp8.swiglu, given), strict=True)
    for mine, eager in pairs:
        assert error(mine, eager) < 0.1 * OFF_VALUES
