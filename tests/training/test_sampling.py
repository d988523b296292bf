from pathlib import Path

import pytest
import torch
from tiny import MODEL, jsonl_corpus, lively_model

from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.model.llama import Llama
from zeroflow.training import sampling
from zeroflow.training.sampling import SamplingConfig

GREEDY = SamplingConfig(tokens=24, temperature=0)
MODEL_384 = MODEL.replace(vocab_size=384)
IDS = Tokenizer(name="ids", path=None, vocab_size=300, end_of_text=299, fingerprint="")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("text")
    corpus = jsonl_corpus(folder / "a.jsonl", ["the river moves the old water near the sea"] * 9)
    config = TokenizerConfig(tokenizer_name="train", vocab_size=300)
    return fetch_tokenizer(config, corpus, folder / "cache")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    model = Llama(MODEL_384, request.param)
    model.load_state_dict(lively_model(MODEL_384).state_dict())
    return model


def likeliest(model, ids: list[int], *, count: int, context: int, stop: int) -> list[int]:
    """Plain greedy decoding within the vocabulary of `IDS`."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-context:]]))[0, -1, : IDS.vocab_size]
        if int(logits.argmax()) == stop:
            break
        ids.append(int(logits.argmax()))
    return ids[1:]


def test_temperature_zero_takes_the_most_likely_tokens_with_any_seed(model):
    expected = likeliest(model, [299], count=24, context=99, stop=299)
    for seed in (0, 1):
        config = GREEDY.replace(seed=seed)
        assert sampling.generate_ids(model, IDS, config, context=99) == expected
    assert len(expected) == 24 and len(set(expected)) > 1


def test_only_the_newest_tokens_within_the_context_are_used(model):
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    short = sampling.generate_ids(model, IDS, GREEDY, context=3)
    assert seen == [1, 2, *[3] * 22]
    assert short == likeliest(model, [299], count=24, context=3, stop=299)
    assert short != likeliest(model, [299], count=24, context=99, stop=299)


@pytest.mark.parametrize("temperature", [1e-300, 1e-31, 1e-29])
def test_temperature_near_zero_is_like_zero(model, temperature):
    cold = GREEDY.replace(temperature=temperature)
    expected = sampling.generate_ids(model, IDS, GREEDY, context=99)
    assert sampling.generate_ids(model, IDS, cold, context=99) == expected


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_of_the_vocabulary_is_never_chosen(model, temperature):
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS.vocab_size :] *= 100
        logits = model(torch.tensor([[299, 5, 6]]))[0]
    assert (logits.argmax(-1) >= IDS.vocab_size).all(), "the padding would win"
    config = SamplingConfig(tokens=60, temperature=temperature, top_k=0)
    ids = sampling.generate_ids(model, IDS, config, context=16)
    assert ids and max(ids) < IDS.vocab_size


def test_end_of_text_ends_the_text(model):
    free = sampling.generate_ids(model, IDS, GREEDY, context=99)
    stop = free[10]
    tokenizer = IDS.replace(end_of_text=stop)
    expected = likeliest(model, [stop], count=24, context=99, stop=stop)
    assert sampling.generate_ids(model, tokenizer, GREEDY, context=99) == expected
    assert stop not in expected


def test_same_seed_gives_the_same_text_and_another_seed_another(model):
    def text(seed: int) -> list[int]:
        config = SamplingConfig(tokens=20, temperature=1.0, seed=seed)
        torch.manual_seed(seed + 100)
        return sampling.generate_ids(model, IDS, config, context=16)

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_top_k_allows_only_the_k_most_likely(model):
    one = SamplingConfig(tokens=24, temperature=5.0, top_k=1)
    assert sampling.generate_ids(model, IDS, one, context=99) == sampling.generate_ids(
        model, IDS, GREEDY, context=99
    )
    with torch.no_grad():
        allowed = set(model(torch.tensor([[299]]))[0, 0, :300].topk(3).indices.tolist())
    chosen = {
        ids[0]
        for seed in range(60)
        if (
            ids := sampling.generate_ids(
                model,
                IDS,
                SamplingConfig(tokens=1, temperature=5.0, top_k=3, seed=seed),
                context=9,
            )
        )
    }
    assert chosen == allowed - {299}


def test_top_p_allows_only_the_likeliest_with_that_probability(model):
    with torch.no_grad():
        chances = model(torch.tensor([[299]]))[0, 0, :300].float().softmax(-1)
    likeliest_first = chances.argsort(descending=True)
    share = float(chances[likeliest_first[:4]].sum()) - 1e-4
    chosen = set()
    for seed in range(80):
        config = SamplingConfig(tokens=1, temperature=1, top_k=0, top_p=share, seed=seed)
        chosen |= {*sampling.generate_ids(model, IDS, config, context=9)}
    assert chosen == {*likeliest_first[:4].tolist()} - {299}


def test_text_begins_with_the_prompt_and_follows_from_it(model, tokenizer):
    ids = tokenizer.load().encode("the river", add_special_tokens=False).ids
    start = [tokenizer.end_of_text, *ids]
    added = likeliest(model, start, count=24, context=99, stop=tokenizer.end_of_text)
    text = sampling.generate(model, tokenizer, "the river", GREEDY, context=99)
    assert text.startswith("the river")
    assert text == tokenizer.load().decode(added, skip_special_tokens=False)


def test_special_token_in_a_prompt_is_text(model, tokenizer):
    text = sampling.generate(model, tokenizer, "<|end_of_text|>", GREEDY, context=99)
    assert text.startswith("<|end_of_text|>")
