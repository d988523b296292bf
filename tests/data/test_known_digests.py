import os

import pytest

from zeroflow import artifacts
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.sources import known_digests


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Two files that are old enough for their digests to be stored."""
    monkeypatch.setattr(known_digests, "_SETTLED_SECONDS", -60)
    monkeypatch.setattr(known_digests, "_WORTH_BYTES", 0)
    for name, content in (("a.txt", "one"), ("b.txt", "two")):
        (tmp_path / name).write_text(content)
    return CorpusConfig(data_mode="files", data_path=(f"{tmp_path}/*.txt",))


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read to compute their digests."""
    found, read = [], artifacts.file_sha256

    def noted(path):
        found.append(path.name)
        return read(path)

    monkeypatch.setattr(artifacts, "file_sha256", noted)
    return found


def test_only_files_that_changed_are_read_again(corpus, reads, tmp_path):
    known = tmp_path / "digests"
    first = resolve_corpus(corpus, known)
    assert reads == ["a.txt", "b.txt"]
    assert resolve_corpus(corpus, known) == first and reads == ["a.txt", "b.txt"]
    before = (tmp_path / "b.txt").stat()
    (tmp_path / "b.txt").write_text("ten")
    os.utime(tmp_path / "b.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = resolve_corpus(corpus, known)
    assert reads == ["a.txt", "b.txt", "b.txt"], (
        "although size and time of modification are the same"
    )
    assert second == resolve_corpus(corpus) != first


def test_file_that_was_just_written_is_read_again(corpus, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(known_digests, "_SETTLED_SECONDS", 60)
    for _ in range(2):
        resolve_corpus(corpus, tmp_path / "digests")
    assert len(reads) == 4


def test_digests_of_a_small_corpus_are_not_stored(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(known_digests, "_WORTH_BYTES", 7)
    resolve_corpus(corpus, tmp_path / "digests")
    assert not (tmp_path / "digests").exists()


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1, "files": {}}'])
def test_damaged_digests_are_ignored(corpus, reads, tmp_path, damage):
    known = tmp_path / "digests"
    first = resolve_corpus(corpus, known)
    [file] = known.iterdir()
    before = file.read_text()
    file.write_text(damage)
    assert resolve_corpus(corpus, known) == first and len(reads) == 4
    assert file.read_text() == before
