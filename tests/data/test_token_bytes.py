"""Bytes of text that tokens represent."""

import json
import random

import numpy as np
import pytest
from public_tokenizers import like_bert, like_llama_2, like_qwen, of_bytes, of_words
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from zeroflow.data.token_bytes import token_bytes

TEXTS = [
    "The river runs past the old bridge.",
    "Ünïcode café 日本語 — 🙂\n\ttabs  and  spaces",
    "日本語 first",
    "x",
    "\n\nThe",
]
WORDS = ["the river runs", "river", "runs the"]
END = 0


def changed(tokenizer: Tokenizer, **parts) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content.update(parts)
    return Tokenizer.from_str(json.dumps(content))


def llama_2_with_bytes_as(special: bool) -> Tokenizer:
    tokenizer = like_llama_2()
    tokenizer.add_tokens([AddedToken(f"<0x{n:02X}>", special=special) for n in range(256)])
    return tokenizer


def with_prefix(decoder) -> Tokenizer:
    tokenizer = of_bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoder
    return tokenizer


def unigram(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    letters = sorted({*"".join(TEXTS)})
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 50, trainer)
    return tokenizer


def without_strip() -> Tokenizer:
    """Like Llama 2's, but its decoder keeps the space that is added before a text."""
    parts = json.loads(like_llama_2().to_str())["decoder"]["decoders"][:-1]
    return changed(like_llama_2(), decoder={"type": "Sequence", "decoders": parts})


def without_latin_letters() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["ανδρα μοι εννεπε μουσα"], trainer)
    return tokenizer


KEEPING = {
    "byte-level": (of_bytes("</s>"), TEXTS),
    "with other added tokens": (like_qwen(), [*TEXTS, "a <tool_call> b"]),
    "with a prefix": (with_prefix(decoders.ByteLevel()), TEXTS),
    "Llama 2": (like_llama_2(), TEXTS),
    "bytes are special": (llama_2_with_bytes_as(special=True), TEXTS),
    "bytes are added": (llama_2_with_bytes_as(special=False), TEXTS),
    "decoder keeps the space": (without_strip(), TEXTS),
    "Metaspace always": (unigram("always"), TEXTS),
    "Metaspace first": (unigram("first"), TEXTS),
    "Metaspace never": (unigram("never"), TEXTS),
    "Greek only": (without_latin_letters(), ["ανδρα μοι", "μουσα"]),
    "words": (of_words("the", "river", "runs"), WORDS),
    "BERT": (like_bert(), ["the river runing", "river"]),
}


@pytest.mark.parametrize("name", KEEPING)
def test_bytes_of_a_documents_tokens_are_the_size_of_its_text(name):
    tokenizer, texts = KEEPING[name]
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        sizes = sizes_of(tokenizer, encoded.ids)
        assert sizes[-1] == 0, "the end of text"
        assert sizes.sum() == len(text.encode()), (text, encoded.tokens, sizes)


def sizes_of(tokenizer: Tokenizer, ids: list[int]):
    begins = np.arange(len(ids) + 1) == 0
    return token_bytes(tokenizer, np.array([*ids, END]), begins, end_of_text=END)


def test_all_documents_of_a_row_are_counted_without_the_added_space():
    tokenizer = like_llama_2()
    ids, begins, rng = [], [], random.Random(0)
    for text in rng.choices(TEXTS, k=20):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        ids += [*found, END]
        begins += [True, *[False] * len(found)]
    rng = random.Random(0)
    size = sum(len(text.encode()) for text in rng.choices(TEXTS, k=20))
    found = token_bytes(tokenizer, np.array(ids), np.array(begins), end_of_text=END)
    assert found.sum() == size


@pytest.mark.parametrize("unknown", ["<unk>", "�", "a long name of the unknown token"])
def test_unknown_tokens_with_any_name_have_no_bytes(unknown):
    model = models.WordLevel({"</s>": 0, unknown: 1, "the": 2, "river": 3}, unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = tokenizer.encode("the old river").ids
    assert sizes_of(tokenizer, ids).tolist() == [3, 0, 6, 0]
    tokenizer.add_special_tokens([unknown])
    assert sizes_of(tokenizer, ids).tolist() == [3, 0, 6, 0]
