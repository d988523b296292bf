import gzip
import json
import json.decoder
import logging
import os
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import wait_until
from tiny import as_jsonl, files_corpus, read_files

from zeroflow import artifacts
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.slices import read_documents
from zeroflow.data.sources import local_files
from zeroflow.settings.run_config import RunConfig


def test_documents_are_read_in_the_order_of_their_names_with_any_globs(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    asked_twice = (tmp_path / "c.txt", tmp_path / "[ab].txt", tmp_path / "*.txt")
    assert [document.text for document in read_files(*asked_twice)] == ["a", "b", "c"]
    everything = files_corpus(str(tmp_path / "*.txt")).data_revision
    assert files_corpus(*map(str, asked_twice)).data_revision == everything


def test_revision_depends_on_names_and_contents_but_not_on_the_folder(tmp_path):
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
    with pytest.raises(ValueError, match="the files of --data-path have changed"):
        resolve_corpus(pinned)


def test_reading_of_large_files_is_announced(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "a.txt").write_text("some text")
    read = artifacts.file_sha256
    files_corpus(str(tmp_path / "a.txt"))
    assert not caplog.messages, "it takes no time"

    def slowly(path):
        wait_until(lambda: caplog.messages)
        return read(path)

    monkeypatch.setattr(local_files, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(artifacts, "file_sha256", slowly)
    files_corpus(str(tmp_path / "a.txt"))
    assert caplog.messages == ["reading 1 file, 0.0 MB, to identify the text"]


def test_files_of_an_unknown_kind_or_none_at_all_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv: unknown kind of file"):
        files_corpus(str(tmp_path / "*"))
    with pytest.raises(ValueError, match=r"--data-path .*\.txt matches no file"):
        files_corpus(str(tmp_path / "*.txt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_mode": "files"}, "--data-mode files needs --data-path"),
        ({"data_mode": "sample", "data_path": ("x",)}, "use --data-mode files"),
        ({"data_mode": "hub"}, "--data-mode hub needs --dataset"),
        ({"data_mode": "files", "data_path": ("x",), "dataset": "a/b"}, "use --data-mode hub"),
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


def test_file_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_text("text")
    with pytest.raises(ValueError, match=r"a\\xff\.txt' is not UTF-8: rename it"):
        files_corpus(str(tmp_path / "*.txt"))


def test_suffixes_may_be_in_capitals_and_names_with_brackets_are_not_patterns(tmp_path):
    (tmp_path / "a[1].JSONL.GZ").write_bytes(gzip.compress(as_jsonl([{"text": "one"}])))
    assert [document.text for document in read_files(tmp_path / "a[1].JSONL.GZ")] == ["one"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", r"is a folder: name its files, as in '.*/\*\.txt'"),
        ("inner/a.jsonl.gz", r"is a folder: name its files, as in '.*/\*\*/\*\.gz'"),
        ("a.md", r"is a folder without a file of a supported kind: \.txt"),
    ],
)
def test_message_for_a_folder_names_a_pattern_that_matches_its_files(tmp_path, name, message):
    folder = tmp_path / "b[1]"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("text")
    with pytest.raises(ValueError, match=message) as refused:
        files_corpus(str(folder))
    if "'" in str(refused.value):
        assert files_corpus(str(refused.value).split("'")[1])


TEXTS = [f"document number {number} about rivers" for number in range(40)]


@pytest.fixture
def linked(tmp_path):
    """A folder with links: the hub's cache has such to files that are named by their hash."""
    (tmp_path / "blobs").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "blobs" / ("a" * 64))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "corpus.txt").write_text(lines)
    (tmp_path / "corpus.jsonl").symlink_to("corpus.txt")
    for commit in ("abc", "def"):
        (tmp_path / "snapshots" / commit).mkdir(parents=True)
        link = tmp_path / "snapshots" / commit / "t.parquet"
        link.symlink_to(f"../../blobs/{'a' * 64}")
    return tmp_path


def test_name_of_a_link_decides_how_its_file_is_read(linked):
    for name in ("corpus.jsonl", "snapshots/abc/t.parquet", "snapshots/abc/*"):
        assert [document.text for document in read_files(linked / name)] == TEXTS
    [document] = read_files(linked / "corpus.txt")
    assert json.loads(document.text.splitlines()[0]) == {"text": TEXTS[0]}


def test_file_with_several_names_is_read_once_under_the_first(linked):
    documents = read_files(linked / "snapshots/*/*.parquet", linked / "snapshots/abc/../def/*")
    assert [document.id for document in documents] == [f"t.parquet:{n}" for n in range(1, 41)]
    with pytest.raises(ValueError, match=r"corpus\.jsonl and .*corpus\.txt are the same file"):
        files_corpus(str(linked / "corpus.*"))


def test_names_below_a_linked_folder_are_as_given(linked):
    (linked / "books").mkdir()
    (linked / "books" / "a.txt").write_text("one")
    (linked / "notes-2024").mkdir()
    (linked / "notes-2024" / "a.txt").write_text("two")
    (linked / "notes").symlink_to("notes-2024")
    documents = read_files(linked / "books/*", linked / "notes/*")
    assert [document.id for document in documents] == ["books/a.txt", "notes/a.txt"]


def test_broken_link_is_refused(linked):
    (linked / "gone.txt").symlink_to("nowhere.txt")
    for pattern in ("gone.txt", "*.txt"):
        with pytest.raises(
            ValueError, match=r"gone\.txt is a link to nowhere\.txt, which does not"
        ):
            files_corpus(str(linked / pattern))


def test_relative_paths_work_from_any_folder(tmp_path, monkeypatch):
    folder = tmp_path / "texts [1]"
    folder.mkdir()
    (folder / "a [2].txt").write_text("one")
    monkeypatch.chdir(folder)
    for pattern in ("a [2].txt", "*.txt", "../texts*/*.txt"):
        asked = CorpusConfig(data_mode="files", data_path=(pattern,)).anywhere
        monkeypatch.chdir(tmp_path)
        corpus = resolve_corpus(asked).corpus
        assert [document.text for document in read_documents(corpus)] == ["one"]
        monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("subset", "name"),
    [
        ("20220301.en", "wiki-20220301.en"),
        ("en (v2)", "wiki-en-v2"),
        ("../x/", "wiki-..-x"),
        ("日本語", "wiki"),
        ("a" * 300, "wiki-" + "a" * 65),
    ],
)
def test_dataset_with_any_name_gives_a_valid_run_name(subset, name):
    corpus = CorpusConfig(data_mode="hub", dataset="owner/Wiki", dataset_config=subset)
    assert corpus.name == name
    RunConfig(run_name=f"custom-{corpus.name}-123456-128gpus-zero3")
