"""Shard sets of many small parts, files and windows."""

import pytest
from shard_sets import ALL

from zeroflow.data import documents, row_files, slices, split_writer
from zeroflow.data.build import build_shards
from zeroflow.data.shards import ShardSet


@pytest.fixture
def small_pieces(monkeypatch):
    """A part for every few documents, a file for every 20 rows, a window for every batch."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(row_files, "SHARD_TOKENS", 20 * 33)
    monkeypatch.setattr(split_writer, "WINDOW_DOCUMENTS", 4)
    monkeypatch.setattr(split_writer, "WINDOW_TOKENS", (100, 5000))


@pytest.fixture(params=["best-fit", "concat"])
def shards(request, small_pieces, text, tmp_path) -> ShardSet:
    """All of the sixty documents: more rows are asked for than there are."""
    return build_shards(ALL.replace(packing=request.param), *text[:2], tmp_path)
