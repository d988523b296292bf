import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import english, llama_tokenizer_repo
from public_tokenizers import (
    like_bert,
    like_clip,
    like_llama_2,
    like_qwen,
    of_bytes,
    of_words,
    save,
)
from tiny import MODEL, jsonl_corpus, lively_model

from zeroflow.data import encoding
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.inference import export as exports
from zeroflow.inference.export import export
from zeroflow.inference.generate import of_folder, of_model
from zeroflow.training import sampling
from zeroflow.training.sampling import SamplingConfig

MODEL_512 = MODEL.replace(vocab_size=512)


@pytest.fixture(scope="module", params=["trained", "llama"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("text")
    corpus = jsonl_corpus(folder / "a.jsonl", [english(random.Random(seed)) for seed in range(9)])
    name = "train"
    if request.param == "llama":
        name = str(folder / "llama")
        (folder / "llama").mkdir()
        for file, content in llama_tokenizer_repo(vocab_size=400).contents.items():
            (folder / "llama" / file).write_bytes(content)
    config = TokenizerConfig(tokenizer_name=name, vocab_size=400)
    return fetch_tokenizer(config, corpus, folder / "cache")


def test_transformers_opens_the_folder_with_the_same_logits_and_ids(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = lively_model(MODEL_512)
    folder = tmp_path / "exported"
    export(model, tokenizer, folder, context=64)

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokens = torch.randint(400, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # the same sums in another order: fp32 rounding at logits of about 1
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=0)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "who reads one reads all"
    assert theirs.dtype == torch.float32
    assert theirs.config.max_position_embeddings == 64
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight

    opened = AutoTokenizer.from_pretrained(folder)
    text = english(random.Random(99)) + "\n\n  é 🙂 123456\t"
    expected = tokenizer.load().encode(text, add_special_tokens=False).ids
    assert opened(text, add_special_tokens=False)["input_ids"] == expected
    assert opened.decode(expected) == text
    assert opened.eos_token_id == tokenizer.end_of_text
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_text
    assert not (folder / "manifest.json").exists()


_LINE = "The river runs past the old stone bridge . don ' t"

KINDS: dict[str, Callable[[Path], Path]] = {
    "gpt2 class": lambda folder: save(
        folder, of_bytes(), {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    ),
    "qwen class": lambda folder: save(
        folder,
        like_qwen(),
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    ),
    "llama class": lambda folder: save(
        folder, like_llama_2(), {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    ),
    "end only in the map": lambda folder: save(
        folder, like_qwen(), None, {"eos_token": {"content": "<|im_end|>", "special": True}}
    ),
    "whole words": lambda folder: save(folder, of_words(*_LINE.split()), {"eos_token": "</s>"}),
    "bert": lambda folder: save(folder, like_bert(), {"eos_token": "[SEP]"}),
    "clip": lambda folder: save(folder, like_clip(), {"eos_token": "</s>"}),
    "dropout": lambda folder: save(folder, of_bytes(), dropout=0.5),
}
PROMPTS = ["", "The river runs", "x\n\n1234 don't ", "<|im_end|> spelled out </s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_the_ids_of_the_shards_and_continues_a_prompt_like_generate(kind, tmp_path):
    from transformers import AutoTokenizer, pipeline

    corpus = jsonl_corpus(tmp_path / "a.jsonl", ["any"])
    config = TokenizerConfig(tokenizer_name=str(KINDS[kind](tmp_path / "tokenizer")))
    tokenizer = fetch_tokenizer(config, corpus, tmp_path / "cache")
    model, out = lively_model(MODEL_512), tmp_path / "exported"
    export(model, tokenizer, out, context=64)

    opened = AutoTokenizer.from_pretrained(out)
    texts = encoding.hard_strings(["<|im_end|>", "</s>", "<tool_call>"])[::20]
    flat, lengths = tokenizer.load_encoder().encode(texts)
    shards = [ids.tolist() for ids in np.split(flat, np.cumsum(lengths)[:-1])]
    assert opened(texts, add_special_tokens=False)["input_ids"] == shards
    assert opened(texts)["input_ids"] == [[tokenizer.end_of_text, *ids] for ids in shards]

    assert opened.decode([tokenizer.end_of_text], skip_special_tokens=True) == ""
    pipe = pipeline("text-generation", str(out))
    greedy = SamplingConfig(temperature=0, tokens=9)
    for prompt in PROMPTS:
        theirs = pipe(prompt, do_sample=False, max_new_tokens=9)[0]["generated_text"]
        ours = sampling.generate(model, tokenizer, prompt, greedy, context=64)
        assert theirs.lstrip() == ours.lstrip() if not prompt else theirs == ours
        for model_and_tokenizer in (of_model(model, tokenizer, context=64), of_folder(out)):
            text = "".join(model_and_tokenizer.stream(prompt, greedy))
            assert (
                text.lstrip() == ours[len(prompt) :].lstrip()
                if not prompt
                else (prompt + text == ours)
            )

    settings = pipe.model.generation_config
    ends = [settings.eos_token_id, settings.bos_token_id, pipe.model.config.eos_token_id]
    assert {*ends, opened.eos_token_id, opened.bos_token_id} == {tokenizer.end_of_text}
    default = SamplingConfig()
    ours = (default.temperature, default.top_k, default.tokens)
    assert (settings.temperature, settings.top_k, settings.max_new_tokens) == ours


def test_export_with_other_ids_than_the_shards_is_refused_and_leaves_no_files(tmp_path):
    """By an encoder that draws its ids at random, as an earlier version let it."""
    corpus = jsonl_corpus(tmp_path / "a.jsonl", ["any"])
    config = TokenizerConfig(tokenizer_name=str(KINDS["dropout"](tmp_path / "tokenizer")))
    tokenizer = fetch_tokenizer(config, corpus, tmp_path / "cache")
    random = tokenizer.replace(encoder="fastokens")
    with pytest.raises(ValueError, match=r"would give other ids to .* cannot be exported"):
        export(lively_model(MODEL_512), random, tmp_path / "exported", context=64)
    assert not (tmp_path / "exported").exists()


def test_model_of_synthetic_data_is_exported_without_a_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM

    ids = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="")
    export(lively_model(MODEL_512), ids, tmp_path, context=64)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id == 499
    assert not list(tmp_path.glob("tokenizer*"))


def test_weights_that_are_larger_than_a_file_are_split(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(exports, "SHARD_BYTES", 100_000)
    ids = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="")
    model = lively_model(MODEL_512)
    export(model, ids, tmp_path, context=64)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(opened[name], weight), name


def test_folder_that_is_not_empty_is_refused_and_unchanged(tmp_path):
    ids = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="is not empty: name a new folder for --out"):
        export(lively_model(MODEL_512), ids, tmp_path, context=64)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("below", ["", "/deep/er"])
def test_folder_below_a_file_is_refused_by_the_names_that_were_given(tmp_path, below):
    ids = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="")
    (tmp_path / "mine").write_text("x")
    out = Path(f"{tmp_path}/mine{below}")
    with pytest.raises(ValueError, match=f"^--out {out}: {tmp_path}/mine is a file, not a folder"):
        export(lively_model(MODEL_512), ids, out, context=64)
    assert (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("tokenizer", "format"), [("trained", "hf"), ("trained", "gguf")], indirect=["tokenizer"]
)
def test_lack_of_room_names_the_folder_and_leaves_nothing(tokenizer, tmp_path, format):
    """Each format is written by another library, with its own error."""
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=rf"no room .* in {out} .* another --out"):
            export(lively_model(MODEL_512), tokenizer, out, context=64, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists()
