import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hub import llama_tokenizer_repo
from hypothesis import given
from hypothesis import strategies as st
from public_tokenizers import like_qwen, of_bytes, save
from tiny import apart_from_reuse, contents, jsonl_corpus
from tokenizers import Tokenizer

from zeroflow import artifacts, reuse
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.documents import Document
from zeroflow.data.slices import read_documents
from zeroflow.data.tokenizer import TokenizerConfig, describe_tokenizer, resolve_tokenizer
from zeroflow.data.tokenizer_origins import fetch_tokenizer, first_bytes

SYNTHETIC = CorpusConfig(data_mode="synthetic")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tokenizer built like Llama 3's, as it lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("models") / "My Llama"
    folder.mkdir()
    for name, content in llama_tokenizer_repo(vocab_size=400).contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder, text, tmp_path_factory):
    config = TokenizerConfig(tokenizer_name=str(llama_folder))
    return fetch_tokenizer(config, text.corpus, tmp_path_factory.mktemp("cache"))


def encode(tokenizer, *texts: str) -> list[list[int]]:
    encoded = tokenizer.load_encoder().encode(list(texts))
    return [ids.tolist() for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.load().decode(ids, skip_special_tokens=False)


@given(document=st.text())
def test_trained_tokenizer_is_lossless(text, document):
    loaded = text.tokenizer.load()
    ids = loaded.encode(document, add_special_tokens=False).ids
    assert loaded.decode(ids, skip_special_tokens=False) == document
    assert all(id_ < text.tokenizer.vocab_size for id_ in ids)


def test_training_merges_frequent_pairs(text):
    document = text.texts[0]
    [ids] = encode(text.tokenizer, document)
    assert len(ids) < 0.7 * len(document.encode())
    assert text.tokenizer.vocab_size == 400


def test_text_with_few_different_words_trains_a_smaller_vocabulary(tmp_path):
    config = TokenizerConfig(tokenizer_name="train", vocab_size=1000)
    tokenizer = fetch_tokenizer(config, jsonl_corpus(tmp_path / "a.jsonl", ["abab ab"]), tmp_path)
    loaded = Tokenizer.from_file(str(tokenizer.path / "tokenizer.json"))
    assert tokenizer.vocab_size == loaded.get_vocab_size() < 300


@pytest.mark.parametrize("which", ["trained", "llama"])
def test_special_tokens_that_a_document_spells_out_are_text(text, llama, which):
    tokenizer = text.tokenizer if which == "trained" else llama
    documents = ["<|end_of_text|>", "<|begin_of_text|>a<|end_of_text|> b", "plain", " "]
    for document, ids in zip(documents, encode(tokenizer, *documents), strict=True):
        assert tokenizer.end_of_text not in ids
        assert decode(tokenizer, ids) == document
        assert Tokenizer.from_file(str(tokenizer.path / "tokenizer.json")).token_to_id(
            "<|begin_of_text|>"
        ) not in set(ids)


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(text, tmp_path):
    lines = ['{"text": "a \\ud800 b"}', '{"text": "\\ud83d\\ude00 \\ude00"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    resolved = resolve_corpus(
        CorpusConfig(data_mode="files", data_path=(str(tmp_path / "a.jsonl"),))
    ).corpus
    sound = [document.text for document in read_documents(resolved)]
    encoded = encode(text.tokenizer, *sound)
    texts = [decode(text.tokenizer, ids) for ids in encoded]
    assert texts == ["a \ufffd b", "\U0001f600 \ufffd"]
    config = TokenizerConfig(tokenizer_name="train", vocab_size=300)
    assert fetch_tokenizer(config, resolved, tmp_path).path.exists()


def test_local_folder_is_copied_without_unrelated_files(llama, llama_folder):
    copied = contents(llama.path)
    assert "model.safetensors" not in copied
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert copied[name] == (llama_folder / name).read_bytes()
    assert llama.path.name.startswith("my-llama-")
    assert llama.vocab_size == 400
    assert llama.end_of_text == llama.load().token_to_id("<|end_of_text|>")


def test_single_tokenizer_file_may_have_any_name(llama, llama_folder, text, tmp_path):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "other.json"
    file.write_bytes((llama_folder / "tokenizer.json").read_bytes())
    config = TokenizerConfig(tokenizer_name=str(file))
    tokenizer = fetch_tokenizer(config, text.corpus, tmp_path / "cache")
    assert sorted(contents(tokenizer.path)) == ["manifest.json", "tokenizer.json"]
    assert tokenizer.fingerprint == llama.fingerprint
    assert encode(tokenizer, "some text") == encode(llama, "some text")


@pytest.mark.parametrize("name", ["train", "folder"])
def test_second_call_reuses_what_the_first_made(name, llama_folder, text, tmp_path):
    config = TokenizerConfig(
        tokenizer_name=str(llama_folder) if name == "folder" else name, vocab_size=300
    )
    first = fetch_tokenizer(config, text.corpus, tmp_path)
    made = first.path.stat().st_mtime_ns
    again = fetch_tokenizer(config, text.corpus, tmp_path)
    assert apart_from_reuse(again) == apart_from_reuse(first) == describe_tokenizer(first.path)
    assert (first.reused, first.why) == (False, "none exists yet")
    assert (again.reused, again.why) == (True, reuse.SAME)
    assert first.path.stat().st_mtime_ns == made


def test_damaged_tokenizer_is_trained_again_to_the_same_bytes(text, tmp_path):
    config = TokenizerConfig(tokenizer_name="train", vocab_size=300)
    tokenizer = fetch_tokenizer(config, text.corpus, tmp_path)
    before = contents(tokenizer.path)
    (tokenizer.path / "tokenizer.json").write_text("{}")
    again = fetch_tokenizer(config, text.corpus, tmp_path)
    assert apart_from_reuse(again) == apart_from_reuse(tokenizer)
    assert again.why == f"{tokenizer.path.name} was damaged and is set aside"
    assert contents(tokenizer.path) == before


def test_other_text_or_size_trains_another_tokenizer(text, tmp_path):
    def trained(corpus, vocab_size):
        config = TokenizerConfig(tokenizer_name="train", vocab_size=vocab_size)
        return fetch_tokenizer(config, corpus, tmp_path)

    other = jsonl_corpus(tmp_path / "other.jsonl", ["something else"])
    first, larger, third = trained(text.corpus, 300), trained(text.corpus, 301), trained(other, 300)
    assert len({first.path, larger.path, third.path}) == 3
    assert larger.why == f"{first.path.name} has --vocab-size 300 instead of 301"
    assert third.why == "none exists yet for this text"


def test_changed_version_is_named_in_the_reason(text, tmp_path, monkeypatch):
    config = TokenizerConfig(tokenizer_name="train", vocab_size=300)
    first = fetch_tokenizer(config, text.corpus, tmp_path)
    monkeypatch.setattr("zeroflow.data.tokenizer.version", lambda name: "99.0")
    again, installed = fetch_tokenizer(config, text.corpus, tmp_path), version("fastokens")
    assert again.reused and again.why.endswith(
        f"the encoders were compared again, because fastokens is 99.0 instead of {installed}"
    )
    monkeypatch.setattr("zeroflow.data.tokenizer.FORMAT", 3)
    monkeypatch.setattr("zeroflow.data.tokenizer_origins.FORMAT", 3)
    newer = fetch_tokenizer(config, text.corpus, tmp_path)
    assert newer.why == f"{first.path.name} has format 2 instead of 3"


def test_tokenizer_of_a_version_without_records_is_unknown(text, tmp_path):
    config = TokenizerConfig(tokenizer_name="train", vocab_size=300)
    path = fetch_tokenizer(config, text.corpus, tmp_path).path
    facts = artifacts.read_signed(path / artifacts.MANIFEST)
    del facts["identity"]
    artifacts.write_signed(path / artifacts.MANIFEST, facts)
    larger = fetch_tokenizer(config.replace(vocab_size=301), text.corpus, tmp_path)
    assert larger.why == f"the settings of {path.name} are unknown: no record can be read"
    assert fetch_tokenizer(config, text.corpus, tmp_path).reused


def test_end_of_text_can_be_chosen_and_is_part_of_the_identity(llama, llama_folder, text, tmp_path):
    config = TokenizerConfig(tokenizer_name=str(llama_folder), end_of_text="<|begin_of_text|>")
    tokenizer = fetch_tokenizer(config, text.corpus, llama.path.parent.parent)
    assert tokenizer.end_of_text == tokenizer.load().token_to_id("<|begin_of_text|>")
    assert tokenizer.path != llama.path and tokenizer.fingerprint != llama.fingerprint
    assert tokenizer.why == f"{llama.path.name} has --end-of-text none instead of <|begin_of_text|>"


def test_tokenizer_without_an_end_of_text_token_is_refused(llama_folder, text, tmp_path):
    (tmp_path / "mute").mkdir()
    tokens = json.loads((llama_folder / "tokenizer.json").read_text())
    tokens["added_tokens"], tokens["post_processor"] = [], None
    (tmp_path / "mute" / "tokenizer.json").write_text(json.dumps(tokens))
    config = TokenizerConfig(tokenizer_name=str(tmp_path / "mute"))
    with pytest.raises(ValueError, match=r"has no token .*--end-of-text"):
        fetch_tokenizer(config, text.corpus, tmp_path / "cache")
    folders = [path for path in (tmp_path / "cache" / "tokenizers").iterdir() if path.is_dir()]
    assert not folders


@pytest.fixture
def fetched(text, tmp_path):
    """Fetches the tokenizer in a folder."""

    def fetch(folder: Path):
        config = TokenizerConfig(tokenizer_name=str(folder))
        return fetch_tokenizer(config, text.corpus, tmp_path / "cache")

    return fetch


@pytest.mark.parametrize(
    ("config", "special_map", "end"),
    [
        (None, {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        (None, {"eos_token": {"content": "<|im_end|>", "special": True}}, "<|im_end|>"),
        ({"eos_token": None}, {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        ({"eos_token": "<|im_end|>"}, {"eos_token": "<|im_start|>"}, "<|im_end|>"),
        ({}, {}, "<|endoftext|>"),
    ],
)
def test_end_of_text_is_taken_from_the_file_that_declares_it(
    config, special_map, end, fetched, tmp_path
):
    tokenizer = fetched(save(tmp_path / "mine", like_qwen(), config, special_map))
    assert tokenizer.end_of_text == tokenizer.load().token_to_id(end)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_settings_with_a_byte_order_mark_are_read(encoding, fetched, tmp_path):
    folder = save(tmp_path / "mine", like_qwen())
    text = '{"eos_token": "<|im_end|>"}'
    (folder / "tokenizer_config.json").write_text(text, encoding=encoding)
    tokenizer = fetched(folder)
    assert tokenizer.end_of_text == tokenizer.load().token_to_id("<|im_end|>")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "contains a list instead of settings by name"),
        ('"x"', "contains str instead of settings by name"),
        ('{"eos_token": ', "is not valid JSON"),
        ('{"eos_token": [2]}', "--end-of-text"),
    ],
)
def test_settings_that_cannot_be_read_are_named(name, content, message, fetched, tmp_path):
    folder = save(tmp_path / "mine", like_qwen())
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as refusal:
        fetched(folder)
    assert name in str(refusal.value) and str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json, and no tokenizer.model, vocab.txt or vocab.json with merges"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
            "has no tokenizer.json",
        ),
        ({"vocab.json": '{"a": 0}'}, "has vocab.json without merges.txt, and no tokenizer.json"),
        ({"merges.txt": ""}, "has merges.txt without vocab.json, and no tokenizer.json"),
    ],
)
def test_folder_without_the_files_of_a_tokenizer_is_refused_by_what_is_missing(
    files, message, fetched, tmp_path
):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in {"config.json": '{"model_type": "llama"}', **files}.items():
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{folder} {message}"):
        fetched(folder)


def test_tokenizer_with_a_byte_order_mark_is_refused_with_what_to_do(fetched, tmp_path):
    folder = save(tmp_path / "mine", like_qwen())
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    with pytest.raises(ValueError, match=r"tokenizer.json .* without a byte-order mark"):
        fetched(folder)


def test_dropout_is_disabled_with_a_warning(fetched, tmp_path, caplog):
    tokenizer = fetched(save(tmp_path / "mine", of_bytes(), dropout=0.5))
    assert "skips 0.5 of its merges at random (BPE dropout)" in caplog.text
    words = "The river runs past the old stone bridge"
    plain = fetched(save(tmp_path / "plain", of_bytes()))
    assert encode(tokenizer, *[words] * 9) == encode(plain, words) * 9
    assert tokenizer.load().encode(words).ids == encode(plain, words)[0]
    digest = artifacts.file_sha256(tokenizer.file)
    with_dropout = artifacts.fingerprint([digest, tokenizer.end_of_text])
    assert tokenizer.fingerprint != with_dropout, "shards with random ids are not reused"


def test_padding_and_truncation_are_disabled_without_a_warning(fetched, tmp_path, caplog):
    padded = of_bytes()
    padded.enable_padding(length=16, pad_id=0, pad_token="<|endoftext|>")
    padded.enable_truncation(8)
    tokenizer = fetched(save(tmp_path / "mine", padded))
    plain = fetched(save(tmp_path / "plain", of_bytes()))
    texts = ["", "a", "The river runs past the old stone bridge " * 9]
    assert encode(tokenizer, *texts) == encode(plain, *texts)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_code_that_comes_with_a_tokenizer_is_neither_copied_nor_run(fetched, tmp_path):
    evil = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n\nclass Mine: pass\n"
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenizer_mine.Mine", None]}}
    folder = save(tmp_path / "mine", of_bytes(), code)
    (folder / "tokenizer_mine.py").write_text(evil)
    tokenizer = fetched(folder)
    assert "tokenizer_mine.py" not in contents(tokenizer.path)

    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(
        ValueError, match=r"no tokenizer.json, and its own Python code, .* is not run"
    ):
        fetched(folder)
    assert not (tmp_path / "ran").exists()


def test_vocabulary_and_merges_need_the_name_of_their_class(fetched, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    of_bytes().model.save(str(folder))
    with pytest.raises(ValueError, match=r"mine has no tokenizer.json, .* does not name their cla"):
        fetched(folder)
    named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    plain = fetched(save(tmp_path / "plain", of_bytes()))
    assert encode(fetched(folder), "The old bridge") == encode(plain, "The old bridge")


def test_synthetic_data_needs_no_tokenizer(tmp_path):
    config = TokenizerConfig(vocab_size=500)
    resolved = resolve_tokenizer(config, SYNTHETIC, tmp_path).tokenizer
    tokenizer = fetch_tokenizer(resolved, SYNTHETIC, tmp_path)
    assert tokenizer.path is None and (tokenizer.vocab_size, tokenizer.end_of_text) == (500, 499)
    assert not list(tmp_path.iterdir())


def test_sample_trains_its_tokenizer_by_default(tmp_path):
    sample = CorpusConfig(data_mode="sample")
    assert (
        resolve_tokenizer(TokenizerConfig(), sample, tmp_path).tokenizer.tokenizer_name == "train"
    )


@pytest.mark.parametrize("name", ["/nowhere/tokenizer", "./nowhere", "nowhere.json"])
def test_local_name_that_does_not_exist_is_not_looked_for_on_the_hub(name, text, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        resolve_tokenizer(TokenizerConfig(tokenizer_name=name), text.corpus, tmp_path)


def test_first_bytes_end_with_the_document_that_passes_the_limit():
    stream = [Document(str(i), "é" * 5) for i in range(10)]
    assert len(list(first_bytes(stream, 10))) == 1
    assert len(list(first_bytes(stream, 11))) == 2
    assert len(list(first_bytes(stream, 10**6))) == 10
