from pathlib import Path

import numpy as np
import pytest
from shard_sets import SMALL, SYNTHETIC, rows_of, synthetic_tokenizer, table_of

from zeroflow.data import rows as data_rows
from zeroflow.data import synthetic
from zeroflow.data.build import build_shards
from zeroflow.data.rows import Rows
from zeroflow.data.shards import SPLITS


def test_reader_finds_rows_in_any_file_and_order(shards):
    for split in SPLITS:
        found = [rows_of(path, split) for path in shards.part_paths]
        expected = np.concatenate([rows for rows in found if len(rows)])
        rows = Rows(shards, split)
        assert (len(rows), rows.row_tokens) == expected.shape
        ids = np.random.default_rng(0).integers(len(rows), size=100)
        assert np.array_equal(rows[ids], expected[ids])
        ends = np.array([len(rows) - 1, 0])
        assert np.array_equal(rows[ends], expected[ends])


def test_any_number_of_shards_can_be_read_and_few_are_open(shards, monkeypatch):
    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    assert len(list(shards.path.glob("*/train-*.arrow"))) > 3
    monkeypatch.setattr(data_rows, "_OPEN_FILES", 2)
    before = held()
    rows = Rows(shards, "train")
    rows[np.arange(len(rows))]
    assert held() == before + 2
    del rows
    assert held() == before


@pytest.mark.parametrize(
    ("token_type", "vocab_size"), [("int32", 70_000), ("uint16", 65_536), ("uint16", 300)]
)
def test_ids_up_to_the_highest_are_kept_in_either_type(token_type, vocab_size, tmp_path):
    config = SMALL.replace(token_type=token_type, packing="concat")
    shards = build_shards(config, SYNTHETIC, synthetic_tokenizer(vocab_size), tmp_path, seed=3)
    rows = Rows(shards, "train")[np.arange(50)]
    assert rows.dtype == np.dtype(token_type)
    assert rows.max() == vocab_size - 1
    block = synthetic.generate_block(vocab_size, 3, 0)
    trained = {line["id"] for line in table_of(shards) if line["split"] == "train"}
    tokens = [
        token
        for name, ids in zip(block.ids, block.tokens, strict=True)
        if name in trained
        for token in ids.tolist()
    ]
    assert rows.ravel().tolist() == tokens[: rows.size]
    assert shards.entropy == pytest.approx(1.25, abs=0.02)
