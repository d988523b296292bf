import pytest
import torch

from zeroflow.model.llama import Llama
from zeroflow.model.sizes import SIZES, with_vocabulary


@pytest.mark.parametrize("vocab_size", [300, 32_768, 50_257, 128_256])
@pytest.mark.parametrize("size", SIZES)
def test_closed_form_counts_the_parameters_that_are_built(size, vocab_size):
    config = with_vocabulary(SIZES[size], vocab_size)
    with torch.device("meta"):
        network = Llama(config)
    assert sum(p.numel() for p in network.parameters()) == config.parameters
    assert network.model.embed_tokens.weight.numel() == config.embedding_parameters


def test_sizes_have_the_published_parameter_counts_in_growing_order():
    counts = {size: with_vocabulary(shape, 128_256).parameters for size, shape in SIZES.items()}
    assert counts == {"tiny": 45_960_000, "small": 317_649_024, "medium": 1_344_899_072}
    assert list(counts) == ["tiny", "small", "medium"]
    assert sorted(counts.values()) == list(counts.values())


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 128), (128, 128), (129, 256), (50_257, 50_304), (128_256, 128_256)]
)
def test_vocabulary_is_padded_up_to_a_multiple_of_128(tokens, rows):
    assert with_vocabulary(SIZES["tiny"], tokens).vocab_size == rows
