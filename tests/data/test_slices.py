import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import as_jsonl, files_corpus

from zeroflow.data import documents, slices
from zeroflow.data.corpus import CorpusConfig, list_files, resolve_corpus
from zeroflow.data.documents import Tally
from zeroflow.data.slices import (
    Slice,
    plan_slices,
    read_documents,
    read_slice,
    require_readable,
)


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
def test_slices_of_any_size_contain_every_document_once_and_in_order(tmp_path, monkeypatch, size):
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
    corpus = files_corpus(str(file))
    assert len(list(read_documents(corpus))) == 1
    listed = list_files(corpus)
    file.write_bytes(as_jsonl([{"text": "two"}]))  # of the same size
    [piece] = plan_slices(corpus, listed, 0).slices
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since the run began"):
        list(read_slice(corpus, piece, Tally()))


def test_files_that_changed_after_a_run_are_read_by_the_next_run_of_the_process(tmp_path):
    """As with two calls of `zeroflow.pretrain` in a notebook."""
    asked = CorpusConfig(data_mode="files", data_path=(str(tmp_path / "*.txt"),))
    found = []
    for names in (("a", "b"), ("a", "c")):  # a is changed, b removed and c added
        for old in tmp_path.iterdir():
            old.unlink()
        for name in names:
            (tmp_path / f"{name}.txt").write_text(f"{name} of {names}")
        require_readable(asked)
        corpus = resolve_corpus(asked).corpus
        found.append([document.text for document in read_documents(corpus)])
        assert found[-1] == [f"{name} of {names}" for name in names]
    assert found[0] != found[1]


def test_file_that_is_gone_before_it_is_cut_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 1)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), file)
    corpus = files_corpus(str(file))
    listed = list_files(corpus)
    file.unlink()
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: .*No such file"):
        plan_slices(corpus, listed, 0)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("change", ["longer", "cut", "other"])
def test_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, kind, change):
    monkeypatch.setattr(documents, "BATCH_BYTES", 1000)
    file = tmp_path / f"a{kind}"
    rows = [{"text": f"{i} " * 50, "id": str(i)} for i in range(3000)]
    if kind == ".jsonl":
        file.write_bytes(as_jsonl(rows) + b"\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=100)
    corpus = files_corpus(str(file))
    [piece] = slices_of(corpus)
    reading = read_slice(corpus, piece, Tally())
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
