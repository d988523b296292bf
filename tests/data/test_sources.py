"""An additional source, with its own kind of files."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from zeroflow.data.corpus import CorpusConfig, list_files, resolve_corpus
from zeroflow.data.documents import Document, TextBatch
from zeroflow.data.formats.format import Format
from zeroflow.data.slices import read_documents
from zeroflow.data.sources.local_files import LocalSource


class Articles(Format):
    """Articles one after another, each begun by a line `= Title =`."""

    description = ".wiki"
    can_be_cut = False

    def read(self, file, start, stop, tally):
        with file.open_decompressed() as stream:
            text = stream.read().decode()
        titles = list(re.finditer(r"^= (.+) =\n", text, re.MULTILINE))
        bounds = pairwise([*(title.start() for title in titles), len(text)])
        for title, (begin, end) in zip(titles, bounds, strict=True):
            yield TextBatch.from_documents([Document(title[1], text[begin:end])])


@dataclass(frozen=True)
class Wiki(LocalSource):
    folder: Path

    title = "articles"

    def find(self):
        return {path.name: path for path in sorted(self.folder.glob("*.wiki"))}

    def format_of(self, name):
        return Articles()


def test_source_with_its_own_format_is_read_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "b.wiki").write_text("= Sea =\nwater\n")
    (tmp_path / "a.wiki").write_text("= Hill =\nstone\n= River =\nwater\n")
    monkeypatch.setattr(CorpusConfig, "source", property(lambda corpus: Wiki(tmp_path)))
    corpus = resolve_corpus(CorpusConfig(data_mode="sample")).corpus
    assert [file.name for file in list_files(corpus)] == ["a.wiki", "b.wiki"]
    found = list(read_documents(corpus))
    assert [document.id for document in found] == ["Hill", "River", "Sea"]
    assert found[0].text == "= Hill =\nstone\n"
    (tmp_path / "b.wiki").write_text("= Sea =\nsalt\n")
    again = resolve_corpus(corpus.replace(data_revision=None)).corpus
    assert again.data_revision != corpus.data_revision
