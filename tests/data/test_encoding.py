import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub import llama_tokenizer_repo
from hypothesis import given
from hypothesis import strategies as st
from patience import HANG_SECONDS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from zeroflow.data import encoding

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    file.write_bytes(llama_tokenizer_repo(vocab_size=400).contents["tokenizer.json"])
    return file


@given(texts=st.lists(st.text(), max_size=4))
def test_fast_encoder_gives_the_ids_of_hugging_face_to_any_text(llama, texts):
    fast, plain = encoding.load(llama, "fastokens"), encoding.load(llama, "tokenizers")
    mine, theirs = fast.encode(texts), plain.encode(texts)
    assert np.array_equal(mine.ids, theirs.ids) and np.array_equal(mine.lengths, theirs.lengths)
    assert mine.ids.dtype == np.int32 and mine.lengths.sum() == len(mine.ids)


def test_fast_encoder_is_chosen_if_it_agrees_on_every_hard_string(llama):
    name, reason = encoding.choose(llama)
    assert name == "fastokens"
    assert f"the same ids for {len(encoding.hard_strings(SPECIAL))} test strings" in reason


def test_hard_strings_contain_what_distinguishes_tokenizers():
    texts = encoding.hard_strings(SPECIAL)
    assert len(texts) > 3000 and texts == encoding.hard_strings(SPECIAL)
    everything = "".join(texts)
    for found in ("<|end_of_text|>", "\x00", "\ufffd", "a" * 60_000, "日本", "\u3000", "👩"):
        assert found in everything
    assert all(text.encode() is not None for text in texts), "none holds a surrogate"


def test_different_ids_are_detected_and_hugging_face_is_used(llama, monkeypatch):
    fast = type(encoding.load(llama, "fastokens"))
    encode = fast.encode

    def one_wrong(self, texts):
        encoded = encode(self, texts)
        ids = encoded.ids.copy()
        ids[-1] += 1
        return encoded._replace(ids=ids)

    monkeypatch.setattr(fast, "encode", one_wrong)
    name, reason = encoding.compare(llama)
    assert name == "tokenizers" and "gives different ids for some of" in reason


def test_hugging_face_is_used_if_the_comparison_crashes(llama, tmp_path, monkeypatch):
    """As the fast library, which is no Python, may crash without an exception."""
    crashing = tmp_path / "fastokens"
    crashing.mkdir()
    (crashing / "__init__.py").write_text("import os; os.abort()")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    name, reason = encoding.choose(llama)
    assert name == "tokenizers" and "failed: exit code -6" in reason


def test_comparison_uses_no_memory_of_the_calling_process(llama):
    code = """
import sys
from pathlib import Path
from zeroflow.data import encoding

def peak_mb():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3

file = Path(sys.argv[1])
peaks = [peak_mb()]
for ask in (encoding.choose, encoding.compare):
    assert ask(file)[0] == "fastokens"
    peaks.append(peak_mb())
print(*peaks)
"""
    command = [sys.executable, "-c", code, str(llama)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    before, chosen, compared = map(float, done.stdout.split())
    assert chosen - before < 5 < 20 < compared - chosen


def test_hugging_face_is_used_if_the_fast_library_cannot_load_the_tokenizer(tmp_path):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=["[UNK]", "[SEP]"])
    tokenizer.train_from_iterator(["some text to learn pieces of"], trainer)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    name, reason = encoding.choose(file)
    loaded = encoding.load(file, name)
    expected = tokenizer.encode("some text", add_special_tokens=False).ids
    assert loaded.encode(["some text"]).ids.tolist() == expected
    assert json.dumps(reason), "a reason that a manifest can hold"
