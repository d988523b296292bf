"""Shard sets are what the first version of their format wrote, byte for byte.

Caches are reused by later versions of the program, so names and contents must not change with the
code. The digests below were recorded from the first code of format 4, and the names of sets and
digests of plans from that of format 5. A new `build.FORMAT` is the only reason to record them
again.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hub import english
from shard_sets import SYNTHETIC, synthetic_tokenizer
from tiny import files_corpus

from zeroflow.data import document_table
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer

RECORDED = {
    "best-fit": {
        "train-00000.arrow": "d89dea9c68cc8283",
        "validation-00000.arrow": "b9e71ce3b21a0d0a",
        "set": "files-64-3521194e5ad0",
        "plan": "227b059eba7cff6a",
        "facts": "475dc32f1b8bb617",
        "table": "5c79e6284d24e5b0",
    },
    "concat": {
        "train-00000.arrow": "2253bd9870ff9e89",
        "validation-00000.arrow": "1b931731b6e82638",
        "set": "files-64-83b88dd0cc2d",
        "plan": "de3217361c1ec1c2",
        "facts": "6f799d5336f7b02c",
        "table": "fefb7fb0b930b871",
    },
    "synthetic": {
        "train-00000.arrow": "c436475d2dbe0f7c",
        "validation-00000.arrow": "748d8cc63b52b100",
        "set": "synthetic-64-71e7d2e2c88e",
        "plan": "26671c4fb23168dd",
        "facts": "3c2bbfd690113057",
        "table": "86815ae1d1a0bf87",
    },
}


def byte_tokenizer(cache: Path, corpus: CorpusConfig) -> Tokenizer:
    """A tokenizer of bytes, written by hand: trained ones change with the library's version."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]
    end = {"id": 256, "content": "<|end_of_text|>", "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": byte_level | {"use_regex": True},
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {letter: i for i, letter in enumerate(letters)} | {"<|end_of_text|>": 256},
            "merges": [],
        },
    }
    file = cache / "bytes" / "tokenizer.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    config = TokenizerConfig(tokenizer_name=str(file.parent))
    return fetch_tokenizer(config, corpus, cache)


def texts(folder: Path) -> CorpusConfig:
    """Lines with and without ids, one of them bad, empty ones, a duplicate, and plain files."""
    rng = random.Random(0)
    documents = [english(rng) for _ in range(40)]
    folder.mkdir()
    lines = [
        json.dumps({"id": f"d{i}", "text": t, "url": f"u{i}"}) for i, t in enumerate(documents)
    ]
    lines += [
        json.dumps({"text": documents[3]}),
        '{"text": null}',
        "no json",
        '{"text": "\\ud83d"}',
    ]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for number in range(3):
        (folder / f"t{number}.txt").write_text(english(rng) + " é", encoding="utf-8")
    return files_corpus(f"{folder}/*", bad_lines_limit=1)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("name", ["best-fit", "concat", "synthetic"])
def test_names_and_contents_are_those_that_were_recorded(name, tmp_path):
    wanted = ShardConfig(seq_len=64, train_rows=10**6, validation_rows=10, validation_fraction=0.1)
    if name == "synthetic":
        few = wanted.replace(train_rows=100)
        shards = build_shards(few, SYNTHETIC, synthetic_tokenizer(300), tmp_path, seed=3)
    else:
        corpus = texts(tmp_path / "texts")
        tokenizer = byte_tokenizer(tmp_path, corpus)
        if name == "concat":
            corpus = corpus.replace(deduplicate=True)
            wanted = wanted.replace(packing="concat", token_type="uint16")
        shards = build_shards(wanted, corpus, tokenizer, tmp_path)
    [part] = shards.part_paths

    def without_places(content: dict[str, Any]) -> str:
        """Digest of everything that does not depend on where the test runs."""
        content.pop("sha256", None)
        return digest(json.dumps(content).replace(str(tmp_path), "").encode())

    plan = json.loads((shards.path / "plan.json").read_text())
    manifest = json.loads((part / "manifest.json").read_text())
    # the bytes of a Parquet file change with pyarrow's version: its lines are compared
    lines = json.dumps(document_table.read(part).to_pylist()).encode()
    found = {file.name: digest(file.read_bytes()) for file in sorted(part.glob("*.arrow"))}
    found |= {"set": shards.path.name, "plan": without_places(plan)}
    found |= {"facts": without_places(manifest["facts"]), "table": digest(lines)}
    assert found == RECORDED[name]
