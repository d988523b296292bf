import random

import pytest
import torch
from hub import english, llama_tokenizer_repo
from tiny import MODEL, jsonl_corpus, lively_model

from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig, fetch_tokenizer
from zeroflow.inference.export import export

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


def test_model_of_synthetic_data_is_exported_without_a_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM

    ids = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="")
    export(lively_model(MODEL_512), ids, tmp_path, context=64)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id == 499
    assert not list(tmp_path.glob("tokenizer*"))


def test_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    ids = Tokenizer(name="ids", path=None, vocab_size=500, end_of_text=499, fingerprint="")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="is not empty: name a new folder for --out"):
        export(lively_model(MODEL_512), ids, tmp_path, context=64)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
