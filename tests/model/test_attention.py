"""Attention, compared with the formula in float64."""

import itertools

import pytest
import torch
from tiny import DEVICES

from zeroflow.model.attention import attend, block_mask, dense_mask, positions_within

LENGTHS = (5, 1, 17, 130, 47)
"""Of the documents of a row, more than one block of flex attention in all."""

DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]


def example(heads: int, kv_heads: int, tokens: int, features: int = 16) -> list[torch.Tensor]:
    """Queries, keys and values of two rows."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, count, tokens, features, generator=generator)
        for count in (heads, kv_heads, kv_heads)
    ]


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor
) -> torch.Tensor:
    """softmax(q kᵀ / √E) v, where `sees` (T, T) says which token looks at which."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ v


def seen(documents: torch.Tensor) -> torch.Tensor:
    """Which token (row) sees which (column), token by token."""
    numbers = documents[0].tolist()
    pairs = itertools.product(range(len(numbers)), repeat=2)
    sees = [key <= query and numbers[key] == numbers[query] for query, key in pairs]
    return torch.tensor(sees).reshape(len(numbers), len(numbers))


SEEN = seen(DOCUMENTS)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_attention_is_causal_and_each_group_of_queries_shares_a_key(heads, tokens):
    q, k, v = example(*heads, tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    # the same sums in another order, in fp32
    expected = written_out(q, k, v, causal).float()
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("make_mask", [dense_mask, block_mask])
def test_masks_allow_a_token_its_own_document_up_to_itself(make_mask):
    q, k, v = example(4, 2, sum(LENGTHS))
    documents = DOCUMENTS.expand(2, -1)
    with torch.compiler.set_stance("force_eager"):  # what compiling changes is tested on a GPU
        ours = attend(q, k, v, make_mask(documents, torch.float32))
    expected = written_out(q, k, v, SEEN).float()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_mask_has_the_type_of_the_scores_and_is_zero_or_minus_infinity(dtype):
    mask = dense_mask(DOCUMENTS, dtype)
    assert mask.dtype == dtype and mask.shape == (1, 1, sum(LENGTHS), sum(LENGTHS))
    assert torch.equal(mask[0, 0] == 0, SEEN)
    assert torch.equal(mask[0, 0] == -torch.inf, ~SEEN)


def test_positions_start_again_with_each_document_of_each_row():
    documents = torch.tensor([[3, 3, 3, 7, 7, 8], [0, 1, 1, 1, 1, 1]])
    assert positions_within(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert positions_within(DOCUMENTS)[0].tolist() == [
        place for length in LENGTHS for place in range(length)
    ]


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_of_a_gpu_agree_with_the_formula(device, deterministic, masked):
    q, k, v = (x.to(device, torch.bfloat16) for x in example(4, 2, sum(LENGTHS), 64))
    sees = SEEN if masked else torch.ones(2 * [sum(LENGTHS)], dtype=torch.bool).tril()
    mask = dense_mask(DOCUMENTS.to(device), q.dtype) if masked else None
    torch.use_deterministic_algorithms(deterministic)
    try:
        ours = attend(q, k, v, mask).double().cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = written_out(q.cpu(), k.cpu(), v.cpu(), sees)
    assert (ours - expected).norm() < 1e-2 * expected.norm(), "bf16 has 8 bits"
