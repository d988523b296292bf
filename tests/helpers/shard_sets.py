"""Small shard sets, and their contents as plain pyarrow reads them."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from tiny import contents

from zeroflow.data import document_table
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import SPLITS, ShardConfig, ShardSet
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer

SYNTHETIC = CorpusConfig(data_mode="synthetic")


SMALL = ShardConfig(seq_len=32, train_rows=50, validation_rows=4, validation_fraction=0.1)


ALL = SMALL.replace(train_rows=10**6, validation_rows=10**6)


def synthetic_tokenizer(vocab_size: int) -> Tokenizer:
    return fetch_tokenizer(
        TokenizerConfig(tokenizer_name="synthetic", vocab_size=vocab_size), SYNTHETIC, Path()
    )


def table_of(shards: ShardSet) -> list[dict]:
    """Return the table of documents, with the number of the part of each line."""
    tables = [document_table.read(path).to_pylist() for path in shards.part_paths]
    return [line | {"part": part} for part, table in enumerate(tables) for line in table]


def rows_of(path: Path, split: str) -> np.ndarray:
    """Return all rows of a split of a part, read by plain pyarrow."""
    files = sorted(path.glob(f"{split}-*.arrow"))
    tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    return np.array([row for table in tables for row in table["tokens"].to_pylist()])


def documents_of(shards: ShardSet) -> dict[str, list[int]]:
    """Return the ids of every document, joined from its pieces."""
    found: dict[str, list[int]] = {}
    rows = {
        (part, split): rows_of(path, split)
        for part, path in enumerate(shards.part_paths)
        for split in SPLITS
    }
    for line in table_of(shards):
        ids = found.setdefault(line["id"], [])
        assert len(ids) == line["start"]
        row = rows[line["part"], line["split"]][line["row"]]
        ids += row[line["offset"] : line["offset"] + line["tokens"]].tolist()
    return found


def digests(shards: ShardSet) -> list[dict[str, str]]:
    return [
        {name: hashlib.sha256(data).hexdigest() for name, data in contents(path).items()}
        for path in shards.part_paths
    ]
