"""GGUF files, read back with the package gguf and, where it is installed, with llama.cpp."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from public_tokenizers import like_bert, like_llama_2, like_qwen, of_bytes, save
from tiny import MODEL, QWEN3, jsonl_corpus, lively_model
from tokenizers import Regex, pre_tokenizers

from zeroflow.data import encoding
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.inference import gguf_file
from zeroflow.inference.export import export
from zeroflow.training import sampling
from zeroflow.training.sampling import SamplingConfig

gguf = pytest.importorskip("gguf")
NEEDS_LLAMA_CPP = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)

MODEL_512 = MODEL.replace(vocab_size=512)

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def fetched(folder: Path, tokenizer=None, **model) -> Tokenizer:
    """A tokenizer in the cache: trained on a text of 60 words, or a copy of `tokenizer`."""
    name = "train"
    corpus = jsonl_corpus(folder / "a.jsonl", ["don't stop 1234 \n\n rivers, stones é 🙂"] * 9)
    if tokenizer is not None:
        name = str(save(folder / "original", tokenizer, {"eos_token": "<|endoftext|>"}, **model))
    config = TokenizerConfig(tokenizer_name=name, vocab_size=300)
    return fetch_tokenizer(config, corpus, folder / "cache")


def splitting(*parts):
    """A byte-level BPE that splits texts with `parts`."""
    tokenizer = of_bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts])
    return tokenizer


def regex(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def fields(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_file_has_the_weights_the_tokens_and_one_end_of_text_id(tmp_path):
    tokenizer, model, out = fetched(tmp_path), lively_model(MODEL_512), tmp_path / "out"
    export(model, tokenizer, out, context=64, name="mine", format="gguf", card="# mine")
    assert {path.name for path in out.iterdir()} == {"mine.gguf", "README.md"}

    found = fields(out / "mine.gguf")
    assert found["general.architecture"] == "llama" and found["llama.context_length"] == 64
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    ends = {found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")}
    assert ends == {tokenizer.end_of_text} and found["tokenizer.ggml.add_bos_token"]
    vocabulary = tokenizer.load().get_vocab()
    assert {t: i for i, t in enumerate(found["tokenizer.ggml.tokens"])} == vocabulary

    tensors = {t.name: t.data for t in gguf.GGUFReader(out / "mine.gguf").tensors}
    weights = model.state_dict()
    assert len(tensors) == len(weights) and "output.weight" not in tensors
    np.testing.assert_array_equal(
        tensors["token_embd.weight"], weights["model.embed_tokens.weight"][: len(vocabulary)]
    )
    np.testing.assert_array_equal(
        tensors["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"]
    )
    # Features 0 and 4 of a head of 8 rotate together: here halves of a head, there neighbours
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(torch.tensor(tensors["blk.0.attn_q.weight"][[0, 1, 2]]), query[[0, 4, 1]])


def test_model_with_norms_of_queries_and_keys_is_a_qwen3(tmp_path):
    model = lively_model(QWEN3.replace(vocab_size=512))
    export(model, fetched(tmp_path), tmp_path / "out", context=64, name="mine", format="gguf")
    found = fields(tmp_path / "out" / "mine.gguf")
    assert found["general.architecture"] == "qwen3" and found["qwen3.attention.key_length"] == 12
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "mine.gguf").tensors}
    weights = model.state_dict()
    assert len(tensors) == len(weights)
    for theirs, ours in (("attn_q", "q_proj"), ("attn_k_norm", "k_norm")):
        np.testing.assert_array_equal(
            tensors[f"blk.1.{theirs}.weight"], weights[f"model.layers.1.self_attn.{ours}.weight"]
        )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("llama-bpe", of_bytes),
        ("gpt-2", lambda: splitting(pre_tokenizers.ByteLevel(add_prefix_space=False))),
        ("gpt-2", lambda: splitting(regex(GPT_2), BYTE_LEVEL)),
        ("qwen2", lambda: splitting(regex(QWEN_2), BYTE_LEVEL)),
        (
            "smollm",
            lambda: splitting(
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ),
        ),
    ],
)
def test_pre_tokenizer_is_named_by_how_the_tokenizer_splits_texts(name, make):
    tokenizer = make()
    assert gguf_file.pre_tokenizer(json.loads(tokenizer.to_str())) == name


def test_pre_tokenizer_that_ignores_merges_is_not_named_if_that_would_give_other_ids():
    """Llama 3's does: there, `abc` is one token although the merges give `a` and `bc`."""
    content = json.loads(of_bytes().to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {**vocabulary, "ab": 400, "bc": 401, "abc": 402}
    content["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    assert gguf_file.pre_tokenizer(content) == "smaug-bpe"
    content["model"]["ignore_merges"] = True
    assert gguf_file.pre_tokenizer(content) == "llama-bpe"


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (like_llama_2, r"only a byte-level BPE can be exported to GGUF"),
        (like_bert, r"of another kind \(WordPiece\): export to hf"),
        (
            lambda: splitting(regex(r"\w+|\W+"), BYTE_LEVEL),
            r"llama.cpp has no pre-tokenizer that splits texts like this tokenizer: .*\\\\w",
        ),
    ],
)
def test_tokenizer_that_llama_cpp_cannot_repeat_is_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        gguf_file.pre_tokenizer(json.loads(tokenizer().to_str()))


def test_tokenizer_that_composes_characters_is_exported_with_a_warning(caplog):
    assert gguf_file.pre_tokenizer(json.loads(like_qwen().to_str())) == "llama-bpe"
    assert "does not compose characters as the tokenizer does (NFC)" in caplog.text


def test_model_without_a_tokenizer_is_refused_and_leaves_no_files(tmp_path):
    ids = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="")
    with pytest.raises(ValueError, match="synthetic data has none: export to hf"):
        export(lively_model(MODEL_512), ids, tmp_path / "out", context=64, format="gguf")
    assert not (tmp_path / "out").exists()


IN_LLAMA_CPP = """
import json, sys
sys.modules["zeroflow"] = None  # an import raises an error
import llama_cpp
asked = json.load(sys.stdin)
model = llama_cpp.Llama(asked["file"], n_ctx=64, logits_all=True, verbose=False)
ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in asked["texts"]]
model.eval(asked["ids"])
logits = model.scores[: len(asked["ids"])].tolist()
written = []
for prompt in asked["prompts"]:
    model.reset()
    tokens = model.tokenize(prompt.encode(), add_bos=True, special=False)
    new = [token for token, _ in zip(model.generate(tokens, temp=0), range(9))]
    new = new[: new.index(model.token_eos())] if model.token_eos() in new else new
    written.append(model.detokenize(new).decode(errors="replace"))
json.dump({"ids": ids, "logits": logits, "written": written}, sys.stdout)
"""


def opened_in_llama_cpp(folder: Path, **asked: object) -> dict[str, list]:
    """Return what llama.cpp makes of a file, in a process that cannot import zeroflow."""
    where = Path(importlib.util.find_spec("llama_cpp").origin).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", IN_LLAMA_CPP],
        input=json.dumps(asked),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(where)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@NEEDS_LLAMA_CPP
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("trained", MODEL_512),
        ("trained", QWEN3.replace(vocab_size=512)),
        ("trained", MODEL_512.replace(features_per_head=12)),
        ("gpt-2", MODEL_512),
        ("qwen2", MODEL_512),
        ("smollm", MODEL_512),
    ],
)
def test_llama_cpp_gives_the_ids_the_logits_and_the_greedy_text(kind, config, tmp_path):
    makes = {
        "trained": lambda: None,
        "gpt-2": lambda: splitting(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "qwen2": lambda: splitting(regex(QWEN_2), BYTE_LEVEL),
        "smollm": lambda: splitting(
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ),
    }
    tokenizer, model = fetched(tmp_path, makes[kind]()), lively_model(config)
    export(model, tokenizer, tmp_path / "out", context=64, name="mine", format="gguf")
    end = tokenizer.end_of_text
    texts = encoding.hard_strings(["<|endoftext|>", "<|x|>"])
    ids = torch.randint(tokenizer.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    prompts = ["The river runs", "x\n\n1234 don't ", "é🙂"]
    found = opened_in_llama_cpp(
        tmp_path,
        file=str(tmp_path / "out" / "mine.gguf"),
        texts=texts,
        ids=ids[0].tolist(),
        prompts=prompts,
    )
    encoded = tokenizer.load().encode_batch(texts, add_special_tokens=False)
    other = [t for t, e, f in zip(texts, encoded, found["ids"], strict=True) if f != [end, *e.ids]]
    assert not other, (len(other), other[:9])
    with torch.no_grad():
        expected = model(ids)[0, :, : tokenizer.vocab_size]
    # llama.cpp rounds keys and values in its cache to fp16
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-2, rtol=0)
    greedy = SamplingConfig(temperature=0, tokens=9)
    ours = [
        sampling.generate(model, tokenizer, prompt, greedy, context=64)[len(prompt) :]
        for prompt in prompts
    ]
    assert found["written"] == ours
