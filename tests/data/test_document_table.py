import json

from shard_sets import (
    ALL,
    documents_of,
    table_of,
)

from zeroflow.data import (
    document_table,
)
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig, resolve_corpus


def test_every_document_is_found_whole_through_the_table(shards, text):
    loaded = text.tokenizer.load()
    found = documents_of(shards)
    assert list(found) != [] and set(found) == {f"d{number}" for number in range(60)}
    for name, ids in found.items():
        document = text.texts[int(name[1:])]
        assert ids[-1] == text.tokenizer.end_of_text
        assert loaded.decode(ids[:-1], skip_special_tokens=False) == document
    for line in table_of(shards):
        assert line["bytes"] == len(text.texts[int(line["id"][1:])].encode())


def test_table_does_not_depend_on_how_many_lines_are_written_at_once(text, tmp_path, monkeypatch):
    whole = table_of(build_shards(ALL, *text[:2], tmp_path / "whole"))
    monkeypatch.setattr(document_table, "MOST_NAME_BYTES", 100)  # as if names were 2**30 bytes long
    assert table_of(build_shards(ALL, *text[:2], tmp_path / "cut")) == whole


def test_documents_that_are_left_out_leave_no_trace_in_the_table(text, tmp_path, monkeypatch):
    monkeypatch.setattr(document_table, "MOST_NAME_BYTES", 500)
    table_of = [{"id": f"d{i}", "url": "u", "text": text} for i, text in enumerate(text.texts)]
    tables = []
    for left_out in ([], [table_of[3] | {"url": "u" * 400}]):
        file = tmp_path / str(len(left_out)) / "a.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps(line) + "\n" for line in [*table_of, *left_out]))
        config = CorpusConfig(data_mode="files", data_path=(str(file),), deduplicate=True)
        shards = build_shards(ALL, resolve_corpus(config).corpus, text.tokenizer, file.parent)
        assert shards.duplicates == len(left_out)
        tables.append((shards.part_paths[0] / document_table.FILE).read_bytes())
    assert tables[0] == tables[1]


def test_ids_and_urls_with_lone_surrogates_are_stored_and_distinguish_documents(
    small_pieces, text, tmp_path
):
    """As different ids they are held out apart, though the table shows them alike."""
    written = [
        {"id": f"\\ud8{i:02x}", "url": "u\\udfff", "text": t} for i, t in enumerate(text.texts)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, written)).replace("\\\\", "\\"))
    corpus = resolve_corpus(CorpusConfig(data_mode="files", data_path=(str(file),))).corpus
    shards = build_shards(ALL, corpus, text.tokenizer, tmp_path)
    assert {(line["id"], line["url"]) for line in table_of(shards)} == {("\ufffd", "u\ufffd")}
    assert shards.documents == 60 and 0 < shards.validation.documents < 20
