import gzip
import json.decoder
import os
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import as_jsonl, files_corpus, read_files

from zeroflow.data import readers, slices
from zeroflow.data.corpus import (
    CorpusConfig,
    Slice,
    first_bytes,
    list_files,
    plan_slices,
    read_documents,
    read_slice,
    resolve_corpus,
    split_positions,
)
from zeroflow.data.readers import Document, Tally


def test_documents_come_in_the_order_of_the_names_whatever_the_globs(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    asked_twice = (tmp_path / "c.txt", tmp_path / "[ab].txt", tmp_path / "*.txt")
    assert [document.text for document in read_files(*asked_twice)] == ["a", "b", "c"]
    everything = files_corpus(str(tmp_path / "*.txt")).data_revision
    assert files_corpus(*map(str, asked_twice)).data_revision == everything


def test_revision_is_of_names_and_contents_not_of_the_place(tmp_path):
    def revision(folder: str, name: str, content: str) -> str | None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
        return files_corpus(str(tmp_path / folder / "*")).data_revision

    here = revision("here", "a.txt", "one")
    assert revision("there", "a.txt", "one") == here
    assert revision("renamed", "b.txt", "one") != here
    assert revision("rewritten", "a.txt", "two") != here


def test_files_that_have_changed_since_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    pinned = files_corpus(str(tmp_path / "a.txt"))
    assert resolve_corpus(pinned).corpus == pinned
    (tmp_path / "a.txt").write_text("two")
    with pytest.raises(ValueError, match="the files of files have changed"):
        resolve_corpus(pinned)


def test_files_of_an_unknown_kind_or_none_at_all_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv: cannot tell what it holds"):
        files_corpus(str(tmp_path / "*"))
    with pytest.raises(ValueError, match=r"--data-path .*\.txt matches no file"):
        files_corpus(str(tmp_path / "*.txt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_mode": "files"}, "data_mode files needs data_path"),
        ({"data_mode": "sample", "data_path": ("x",)}, "add --data-mode files"),
        ({"data_mode": "hub"}, "data_mode hub needs dataset"),
        ({"data_mode": "files", "data_path": ("x",), "dataset": "a/b"}, "add --data-mode hub"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**settings)


def test_sample_is_the_source_of_the_standard_library():
    settled = resolve_corpus(CorpusConfig(data_mode="sample")).corpus
    documents = {document.id: document.text for document in read_documents(settled)}
    source = Path(json.decoder.__file__)
    assert documents["json/decoder.py"] == source.read_text(encoding="utf-8")
    assert len(documents) > 100
    assert not any("site-packages" in name for name in documents)
    first = [document.id for document in islice(read_documents(settled), 100)]
    assert first == list(documents)[:100]
    assert len({name.split("/")[0] for name in first}) > 10, "the order mixes the subjects"


def test_held_out_places_are_spread_evenly_and_known_from_the_id_alone():
    ids = [f"document {i}".encode() for i in range(10_000)]
    places = sorted(split_positions(ids).tolist())
    # Kolmogorov-Smirnov: one in a million even samples deviates by more than 0.027
    assert max(abs(place - i / 10_000) for i, place in enumerate(places)) < 0.027
    assert split_positions(ids[7:8]) == split_positions(ids)[7]


def test_first_bytes_end_with_the_document_that_passes_the_limit():
    stream = [Document(str(i), "é" * 5) for i in range(10)]
    assert len(list(first_bytes(stream, 10))) == 1
    assert len(list(first_bytes(stream, 11))) == 2
    assert len(list(first_bytes(stream, 10**6))) == 10


def write_large(folder: Path) -> Path:
    """A few kilobytes of lines and of row groups, to be cut at every kilobyte."""
    rows = [{"text": f"{i} " + "é" * (i * 7 % 90)} for i in range(90)]
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(as_jsonl(rows) + b"\n")
    pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet", row_group_size=7)
    for name in ("c", "d", "e"):
        (folder / f"{name}.txt").write_text(name * 600)
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(as_jsonl(rows)))
    return folder


def slices_of(corpus: CorpusConfig) -> list[Slice]:
    listed, first, found = list_files(corpus), 0, []
    while first < len(listed):
        planned, first = plan_slices(corpus, listed, first)
        found += planned
    return found


@pytest.mark.parametrize("size", [1, 10, 999, 1000, 5000, 10**6])
def test_slices_of_any_size_hold_every_document_once_and_in_order(tmp_path, monkeypatch, size):
    config = files_corpus(str(write_large(tmp_path / "text") / "*"))
    whole = list(read_documents(config))
    assert len(whole) == 3 * 90 + 3
    monkeypatch.setattr(slices, "SLICE_BYTES", size)
    cut = slices_of(config)
    if size == 999:
        assert len(cut) > 10, "large files are cut"
        assert [file.name for piece in cut for file in piece.files].count("f.jsonl.gz") == 1
    if size == 10**6:
        assert len(cut) == 1, "small files are taken together"
    # each alone, and in another order than they lie
    read = {i: list(read_slice(config, cut[i], Tally())) for i in reversed(range(len(cut)))}
    batches = [batch for i in range(len(cut)) for batch in read[i]]
    texts = [text for batch in batches for text in batch.texts]
    ids = [name.decode() for batch in batches for name in batch.ids.to_pylist()]
    assert texts == [document.text for document in whole]
    assert len(set(ids)) == len(ids)
    assert ids == [document.id for document in whole]
    sizes = [size for batch in batches for size in batch.text_bytes.tolist()]
    assert sizes == [len(text.encode()) for text in texts]


def test_file_that_has_changed_since_its_digest_is_not_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_jsonl([{"text": "one"}]))
    settled = files_corpus(str(file))
    assert len(list(read_documents(settled))) == 1
    listed = list_files(settled)
    file.write_bytes(as_jsonl([{"text": "two"}]))  # of the same size
    [piece] = plan_slices(settled, listed, 0).slices
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since the run began"):
        list(read_slice(settled, piece, Tally()))


def test_file_that_is_gone_before_it_is_cut_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 1)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), file)
    settled = files_corpus(str(file))
    listed = list_files(settled)
    file.unlink()
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: .*No such file"):
        plan_slices(settled, listed, 0)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("change", ["longer", "cut", "other"])
def test_file_that_changes_while_it_is_read_is_not_taken_for_what_it_was(
    tmp_path, monkeypatch, kind, change
):
    monkeypatch.setattr(readers, "_READ_BYTES", 1000)
    file = tmp_path / f"a{kind}"
    rows = [{"text": f"{i} " * 50, "id": str(i)} for i in range(3000)]
    if kind == ".jsonl":
        file.write_bytes(as_jsonl(rows) + b"\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=100)
    settled = files_corpus(str(file))
    [piece] = slices_of(settled)
    reading = read_slice(settled, piece, Tally())
    next(reading)
    content = file.read_bytes()
    with file.open("r+b") as there:  # in place, as other programs append
        match change:
            case "longer":
                there.seek(0, os.SEEK_END)
                there.write(content[-200:])
            case "cut":
                there.truncate(len(content) // 2)
            case "other":
                there.write(content)
    with pytest.raises(ValueError, match=f"a{kind} has changed since the run began"):
        list(reading)


def test_file_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_text("text")
    with pytest.raises(ValueError, match=r"a\\xff\.txt' is not UTF-8: rename it"):
        files_corpus(str(tmp_path / "*.txt"))


def test_suffixes_are_known_in_capitals_and_names_with_brackets_are_names(tmp_path):
    (tmp_path / "a[1].JSONL.GZ").write_bytes(gzip.compress(as_jsonl([{"text": "one"}])))
    assert [document.text for document in read_files(tmp_path / "a[1].JSONL.GZ")] == ["one"]
    with pytest.raises(ValueError, match=r"is a folder: name its files, as in .*\*\.jsonl"):
        files_corpus(str(tmp_path))
