import gzip
import json.decoder
import os
from itertools import islice
from pathlib import Path

import pytest
from tiny import as_jsonl, files_corpus, read_files

from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.slices import read_documents


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
    with pytest.raises(ValueError, match="the files of the corpus have changed"):
        resolve_corpus(pinned)


def test_files_of_an_unknown_kind_or_none_at_all_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv: unknown kind of file"):
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


def test_file_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_text("text")
    with pytest.raises(ValueError, match=r"a\\xff\.txt' is not UTF-8: rename it"):
        files_corpus(str(tmp_path / "*.txt"))


def test_suffixes_are_known_in_capitals_and_names_with_brackets_are_names(tmp_path):
    (tmp_path / "a[1].JSONL.GZ").write_bytes(gzip.compress(as_jsonl([{"text": "one"}])))
    assert [document.text for document in read_files(tmp_path / "a[1].JSONL.GZ")] == ["one"]
    with pytest.raises(ValueError, match=r"is a folder: name its files, as in .*\*\.jsonl"):
        files_corpus(str(tmp_path))
