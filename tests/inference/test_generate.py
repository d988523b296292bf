"""Generation with a key/value cache, and its text in pieces."""

from types import SimpleNamespace

import pytest
import torch
from public_tokenizers import of_bytes
from tiny import MODEL, QWEN3, lively_model

from zeroflow.data.tokenizer import Tokenizer
from zeroflow.inference import generate
from zeroflow.inference.generate import TextGenerator, of_folder, of_model, remark_on
from zeroflow.model.hugging_face import as_hugging_face
from zeroflow.training import sampling
from zeroflow.training.sampling import SamplingConfig

IDS = Tokenizer(name="ids", path=None, vocab_size=250, end_of_text=249, fingerprint="")


@pytest.mark.parametrize("config", [MODEL, QWEN3], ids=["llama", "qwen3"])
def test_model_of_hugging_face_shares_the_weights(config):
    model = lively_model(config)
    theirs = as_hugging_face(model, context=64, end_of_text=0)
    ours = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    assert {name: weight.data_ptr() for name, weight in theirs.state_dict().items()} == ours
    tokens = torch.randint(MODEL.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # the same sums in another order: fp32 rounding at logits of about 1
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=0)


def test_cache_changes_no_logits_and_no_most_likely_token(monkeypatch):
    model, seen = lively_model(), []

    class Watched(generate._Cached):
        def __call__(self, ids: list[int]) -> torch.Tensor:
            logits = super().__call__(ids)
            with torch.no_grad():
                plain = model(torch.tensor([ids]))[0, -1, : IDS.vocab_size]
            seen.append(float((logits - plain).abs().max()))
            assert logits.argmax() == plain.argmax()
            return logits

    monkeypatch.setattr(generate, "_Cached", Watched)
    config = SamplingConfig(tokens=60, temperature=2, top_k=0)
    text = of_model(model, IDS, context=64).generate("", config)
    uncached = sampling.generate_ids(model, IDS, config, context=64)
    assert text == " ".join(map(str, uncached)) and len({*uncached}) > 9
    # the same sums in another order: fp32 rounding at logits of about 1
    assert len(seen) > 30 and max(seen) < 1e-5


def test_text_beyond_the_context_follows_from_the_newest_half_of_it():
    model, config = lively_model(), SamplingConfig(tokens=20, temperature=0)
    ids = of_model(model, IDS, context=8).generate("", config).split()
    text = [IDS.end_of_text, *map(int, ids)]
    expected, begin = [IDS.end_of_text], 0
    with torch.no_grad():
        while len(expected) < len(text):
            begin = len(expected) - 4 if len(expected) - begin > 8 else begin
            logits = model(torch.tensor([expected[begin:]]))[0, -1, : IDS.vocab_size]
            expected.append(int(logits.argmax()))
    assert text == expected and len(text) == 21


def scripted(text: str, *, tail: bytes = b"") -> TextGenerator:
    """Return a generator whose model writes `text` and `tail`, one byte in each token."""
    tokenizer = of_bytes()
    ids = [tokenizer.token_to_id(letter) for letter in _letters(text.encode() + tail)]
    ids.append(0)

    def network(new: torch.Tensor, past_key_values: int | None, **_: object) -> SimpleNamespace:
        done = past_key_values or 0
        logits = torch.zeros(1, 1, tokenizer.get_vocab_size())
        logits[0, 0, ids[done]] = 1
        return SimpleNamespace(logits=logits, past_key_values=done + 1)

    network.device = torch.device("cpu")
    vocab_size = tokenizer.get_vocab_size()
    return TextGenerator(
        network,
        lambda prompt: [0],
        lambda ids: tokenizer.decode(ids),
        frozenset([0]),
        vocab_size,
        99,
    )


def _letters(content: bytes) -> list[str]:
    """Return the letters by which a byte-level vocabulary names bytes, as those of GPT-2."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return [letters[byte] for byte in content]


GREEDY = SamplingConfig(tokens=90, temperature=0)


def test_character_of_several_tokens_is_shown_when_it_is_complete():
    text = "né 🙂漢"
    assert list(scripted(text).stream("", GREEDY)) == list(text)
    cut = list(scripted("a🙂", tail="🙂".encode()[:2]).stream("", GREEDY))
    assert cut[:2] == ["a", "🙂"] and {*"".join(cut[2:])} == {"\ufffd"}


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["stop"], "go on and "),
        (["never", "and"], "go on "),
        (["and s", "on"], "go "),
        (["stopped"], "go on and stop st"),
        (["\n\n"], "go on and stop st"),
    ],
)
def test_text_ends_before_a_stop_text_and_no_part_of_it_is_shown(stop, expected):
    pieces = list(scripted("go on and stop st").stream("", GREEDY, stop))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    with pytest.raises(ValueError, match="a text to stop at is empty"):
        scripted("go").stream("", GREEDY, ["a", ""])


def test_space_at_the_end_of_a_prompt_is_remarked(caplog):
    remark_on("we ")
    assert "the prompt ends with a space" in caplog.text
    caplog.clear()
    remark_on("we")
    list(scripted("go").stream("we ", GREEDY))  # of several texts, or of a task
    assert not caplog.text


def test_sampled_text_is_that_of_training_with_the_same_seed():
    model = lively_model()
    for config in (SamplingConfig(tokens=30, seed=3), SamplingConfig(tokens=30, top_p=0.5, seed=4)):
        ids = sampling.generate_ids(model, IDS, config, context=64)
        assert of_model(model, IDS, context=64).generate("", config) == " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["tokenizer.json"], r"has no weights \(model\.safetensors\)"),
        (["model.safetensors"], r"has no tokenizer\.json, and no tokenizer\.model"),
        (["model.safetensors", "vocab.json"], r"has vocab\.json without merges\.txt"),
    ],
)
def test_folder_that_lacks_files_of_a_model_is_refused_by_what_is_missing(files, message, tmp_path):
    for name in ("config.json", *files):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"^{tmp_path} {message}"):
        of_folder(tmp_path)
