import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from shard_sets import ALL, SMALL
from tiny import apart_from_reuse, contents

from zeroflow.data import known_parts, part_counts
from zeroflow.data.build import build_shards
from zeroflow.data.rows import Rows
from zeroflow.data.shards import SPLITS


@pytest.fixture
def paged(small_pieces, text, tmp_path, monkeypatch):
    """A set of which all parts but the last are in pages of two; the number of parts is odd."""
    monkeypatch.setattr(part_counts, "PAGE_PARTS", 2)
    shards = build_shards(ALL, *text[:2], tmp_path)
    assert shards.parts > 4
    return shards


def again(text, tmp_path, config=ALL):
    return build_shards(config, *text[:2], tmp_path)


def as_earlier_versions_wrote(page: Path) -> None:
    """Rewrite a page without its last column."""
    with pa.ipc.open_file(page.read_bytes()) as reader:
        batch = reader.get_batch(0)
    names = batch.schema.names[:-1]
    lines = np.stack([batch.column(name).to_numpy() for name in names], axis=1)
    facts = {"format": "1", "sha256": hashlib.sha256(lines.tobytes()).hexdigest()}
    batch = batch.select(names).replace_schema_metadata(facts)
    with pa.ipc.new_file(page, batch.schema) as writer:
        writer.write_batch(batch)


def test_pages_of_earlier_versions_are_used(paged, text, tmp_path, caplog):
    pages = sorted(paged.path.glob("counts-*.arrow"))
    for page in pages:
        as_earlier_versions_wrote(page)
    before = {page: page.read_bytes() for page in pages}
    assert apart_from_reuse(again(text, tmp_path)) == apart_from_reuse(paged)
    assert {page: page.read_bytes() for page in pages} == before
    assert "cannot be read" not in caplog.text


def test_set_is_the_same_with_pages_and_without(paged, text, tmp_path):
    pages = sorted(paged.path.glob("counts-*.arrow"))
    assert len(pages) == paged.parts // 2
    by_pages = [Rows(paged, split) for split in SPLITS]
    before = contents(paged.path)
    reused = again(text, tmp_path)
    assert reused.reused and apart_from_reuse(reused) == apart_from_reuse(paged)
    assert contents(paged.path) == before
    for page in pages:
        page.unlink()
    assert again(text, tmp_path) == reused
    assert contents(paged.path) == before, "pages are written again"
    for page in pages:
        page.unlink()
    for one, split in zip(by_pages, SPLITS, strict=True):
        other, ids = Rows(paged, split), np.arange(len(one))
        assert np.array_equal(other[ids], one[ids])


@pytest.mark.parametrize("rows", [1, 40, 60, 100])
def test_short_run_reads_as_many_parts_as_without_pages(paged, text, tmp_path, rows):
    config = SMALL.replace(train_rows=rows)
    by_pages = again(text, tmp_path, config)
    for page in paged.path.glob("counts-*.arrow"):
        page.unlink()
    assert again(text, tmp_path, config) == by_pages


def test_start_reads_a_limited_number_of_parts(paged, text, tmp_path, monkeypatch):
    monkeypatch.setattr(known_parts, "VERIFIED_BYTES", 0)
    monkeypatch.setattr(known_parts.secrets, "randbelow", lambda parts: 1)
    for part in paged.part_paths[2 : paged.parts // 2 * 2]:
        (part / "manifest.json").unlink()
    assert again(text, tmp_path).reused, "only part 1, and the last one, are looked at"
    monkeypatch.setattr(known_parts, "VERIFIED_BYTES", 2**33)
    mended = again(text, tmp_path)
    assert apart_from_reuse(mended) == apart_from_reuse(paged)
    assert mended.why.startswith("3 of") or "part-00002 was damaged" in mended.why


def test_deleted_part_is_built_again_although_its_page_lists_it(paged, text, tmp_path, monkeypatch):
    monkeypatch.setattr(known_parts, "VERIFIED_BYTES", 0)
    before = contents(paged.path)
    shutil.rmtree(paged.part_paths[1])
    mended = again(text, tmp_path)
    assert not mended.reused and apart_from_reuse(mended) == apart_from_reuse(paged)
    after = contents(paged.path)
    del before["builds.jsonl"], after["builds.jsonl"]
    assert after == before


def test_changed_page_is_not_used(paged, text, tmp_path):
    page = paged.path / "counts-00000.arrow"
    before = page.read_bytes()
    line = part_counts.pages(paged.path)[0]
    rows = int(line[0]).to_bytes(8, "little")
    page.write_bytes(before.replace(rows, (10**6).to_bytes(8, "little"), 1))
    assert apart_from_reuse(again(text, tmp_path)) == apart_from_reuse(paged)
    assert page.read_bytes() == before
