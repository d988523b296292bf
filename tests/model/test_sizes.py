import pytest
import torch

from zeroflow.model.llama import Llama
from zeroflow.model.sizes import SIZES, by_size, nearest_size, with_vocabulary


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
    published = {"tiny": 45_960_000, "small": 317_649_024, "medium": 1_344_899_072}
    assert counts.items() >= published.items()
    assert sorted(counts.values()) == list(counts.values())


def test_defaults_of_a_custom_shape_are_those_of_the_nearest_size():
    for size in SIZES.values():
        assert nearest_size(size) is size
        assert nearest_size(size.replace(num_hidden_layers=size.num_hidden_layers + 2)) is size
    wide, narrow = (SIZES["tiny"].replace(hidden_size=width) for width in (20_000, 20))
    assert nearest_size(wide) is list(SIZES.values())[-1]
    assert nearest_size(narrow) is SIZES["tiny"]


def test_help_lists_every_size_in_the_same_order():
    layers = " / ".join(str(size.num_hidden_layers) for size in SIZES.values())
    told = by_size(lambda size: f"{size.num_hidden_layers}")
    assert told == f"{layers} for {' / '.join(SIZES)}"


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 128), (128, 128), (129, 256), (50_257, 50_304), (128_256, 128_256)]
)
def test_vocabulary_is_padded_up_to_a_multiple_of_128(tokens, rows):
    assert with_vocabulary(SIZES["tiny"], tokens).vocab_size == rows
