import bz2
import gzip
import json
import json.decoder
import lzma
import os
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import files_corpus

from zeroflow.data import corpus, readers
from zeroflow.data.corpus import CorpusConfig, Slice
from zeroflow.data.readers import Document, Tally


def with_pyarrow(codec):
    def compress(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": with_pyarrow("zstd"),
    ".lz4": with_pyarrow("lz4"),
}
ROWS = [
    {"id": "a", "url": "https://example.org/a", "text": "one\ntwo é\u2028 "},
    {"id": "b", "url": "", "text": "three"},
]


def as_txt(rows: list[dict[str, str]]) -> bytes:
    return rows[0]["text"].encode()


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def not_utf8(column: str) -> bytes:
    """A file whose schema calls some bytes a string, as a careless writer may."""
    columns = {"text": pa.array(["x"]), "id": pa.array(["a"]), "url": pa.array([""])}
    columns[column] = pa.array([b"\xff"]).view(pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def read(*paths: object, **settings: str) -> list[Document]:
    return list(corpus.documents(files_corpus(*map(str, paths), **settings)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_of_every_kind_are_read_also_compressed(tmp_path, suffix):
    for kind, write in ((".txt", as_txt), (".jsonl", as_jsonl), (".parquet", as_parquet)):
        (tmp_path / f"file{kind}{suffix}").write_bytes(COMPRESS[suffix](write(ROWS)))
    whole = [Document(**row) for row in ROWS]
    assert read(tmp_path / f"*.jsonl{suffix}") == whole
    assert read(tmp_path / f"*.parquet{suffix}") == whole
    assert read(tmp_path / f"*.txt{suffix}") == [Document(f"file.txt{suffix}", ROWS[0]["text"])]


def test_documents_without_id_are_named_after_their_file_and_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text(
        '{"text": "one"}\n\n{"text": "two", "id": 3}\n{"text": "x"}'
    )
    (tmp_path / "b.parquet").write_bytes(as_parquet([{"text": "three"}, {"text": "four"}]))
    ids = [document.id for document in read(tmp_path / "**" / "*.*")]
    assert ids == ["a/x.jsonl@0", "3", "a/x.jsonl@42", "b.parquet:1", "b.parquet:2"]


def test_documents_come_in_the_order_of_the_names_whatever_the_globs(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    asked_twice = (tmp_path / "c.txt", tmp_path / "[ab].txt", tmp_path / "*.txt")
    assert [document.text for document in read(*asked_twice)] == ["a", "b", "c"]
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
    assert corpus.resolve(pinned).corpus == pinned
    (tmp_path / "a.txt").write_text("two")
    with pytest.raises(ValueError, match="the files of files have changed"):
        corpus.resolve(pinned)


def test_empty_documents_are_left_out(tmp_path):
    rows = [{"text": "one"}, {"text": ""}, {"text": None}, {"text": "two"}]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    (tmp_path / "b.txt").write_text("")
    assert [document.text for document in read(tmp_path / "*")] == ["one", "two"]


def test_text_may_be_in_another_column(tmp_path):
    rows = [{"body": "one", "id": "a"}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    (tmp_path / "b.parquet").write_bytes(as_parquet(rows))
    assert read(tmp_path / "*", text_column="body") == [Document("a", "one")] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', r"a\.jsonl"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl, line 1 has no text.*'body'.*--text-column"),
        ("a.jsonl", b'{"text": 1}', r"a\.jsonl, line 1 has no text in field 'text'"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1 has no text in field 'text', only list"),
        ("a.txt", b"\xff\xfe", r"a\.txt cannot be read: .*utf-8"),
        ("a.txt.gz", b"this is no gzip", r"a\.txt\.gz"),
        ("a.jsonl.xz", b"this is no xz", r"a\.jsonl\.xz"),
        ("a.txt.zst", COMPRESS[".zst"](b"text" * 999)[:-9], r"a\.txt\.zst"),
        ("a.parquet", b"this is no parquet", r"a\.parquet"),
        ("a.parquet", as_parquet([{"body": "x"}]), r"a\.parquet has no one column 'text'.*'body'"),
        *(("a.parquet", not_utf8(c), r"a\.parquet cannot be read") for c in ("text", "id", "url")),
        ("a.parquet", as_parquet([{"text": 1}]), r"a\.parquet has int64 in column 'text', no text"),
    ],
)
def test_file_that_breaks_its_promise_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


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
    settled = corpus.resolve(CorpusConfig(data_mode="sample")).corpus
    documents = {document.id: document.text for document in corpus.documents(settled)}
    source = Path(json.decoder.__file__)
    assert documents["json/decoder.py"] == source.read_text(encoding="utf-8")
    assert len(documents) > 100
    assert not any("site-packages" in name for name in documents)
    first = [document.id for document in islice(corpus.documents(settled), 100)]
    assert first == list(documents)[:100]
    assert len({name.split("/")[0] for name in first}) > 10, "the order mixes the subjects"


def test_held_out_places_are_spread_evenly_and_known_from_the_id_alone():
    ids = [f"document {i}".encode() for i in range(10_000)]
    places = sorted(corpus.held_out(ids).tolist())
    # Kolmogorov-Smirnov: one in a million even samples deviates by more than 0.027
    assert max(abs(place - i / 10_000) for i, place in enumerate(places)) < 0.027
    assert corpus.held_out(ids[7:8]) == corpus.held_out(ids)[7]


def test_first_bytes_end_with_the_document_that_passes_the_limit():
    stream = [Document(str(i), "é" * 5) for i in range(10)]
    assert len(list(corpus.first_bytes(stream, 10))) == 1
    assert len(list(corpus.first_bytes(stream, 11))) == 2
    assert len(list(corpus.first_bytes(stream, 10**6))) == 10


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


def slices(config: CorpusConfig) -> list[Slice]:
    listed, first, found = corpus.files(config), 0, []
    while first < len(listed):
        planned, first = corpus.plan(config, listed, first)
        found += planned
    return found


@pytest.mark.parametrize("size", [1, 10, 999, 1000, 5000, 10**6])
def test_slices_of_any_size_hold_every_document_once_and_in_order(tmp_path, monkeypatch, size):
    config = files_corpus(str(write_large(tmp_path / "text") / "*"))
    whole = list(corpus.documents(config))
    assert len(whole) == 3 * 90 + 3
    monkeypatch.setattr(corpus, "SLICE_BYTES", size)
    cut = slices(config)
    if size == 999:
        assert len(cut) > 10, "large files are cut"
        assert [file.name for piece in cut for file in piece.files].count("f.jsonl.gz") == 1
    if size == 10**6:
        assert len(cut) == 1, "small files are taken together"
    # each alone, and in another order than they lie
    read = {i: list(corpus.read(config, cut[i], Tally())) for i in reversed(range(len(cut)))}
    batches = [batch for i in range(len(cut)) for batch in read[i]]
    texts = [text for batch in batches for text in batch.texts]
    ids = [name.decode() for batch in batches for name in batch.ids.to_pylist()]
    assert texts == [document.text for document in whole]
    assert len(set(ids)) == len(ids)
    assert ids == [document.id for document in whole]
    sizes = [size for batch in batches for size in batch.text_bytes.tolist()]
    assert sizes == [len(text.encode()) for text in texts]


def test_bad_lines_are_left_out_counted_and_told_up_to_a_limit(tmp_path):
    lines = [b'{"text": "one"}', b"{", b'{"body": 1}', b'{"text": "two"}', b"", b"\xff"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    config = files_corpus(str(tmp_path / "a.jsonl"), bad_lines_limit=3)
    tally = Tally()
    [piece] = slices(config)
    assert [batch.texts for batch in corpus.read(config, piece, tally)] == [["one", "two"]]
    assert tally.bad == 3
    for place, reason in zip(tally.places, ("2 is not JSON", "3 has no text", "6 is"), strict=True):
        assert f"a.jsonl, line {reason}" in place
    strict = config.replace(bad_lines_limit=2)
    with pytest.raises(ValueError, match=r"line 6 is not JSON.*3 bad lines, --bad-lines-limit 2"):
        list(corpus.read(strict, piece, Tally()))


def test_damaged_page_of_a_parquet_file_is_noticed_where_the_file_has_checksums(tmp_path):
    rows = [{"text": f"text {i}" * 9} for i in range(500)]
    file = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: .*checksum"):
        read(file)


def test_file_that_has_changed_since_its_digest_is_not_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_jsonl([{"text": "one"}]))
    settled = files_corpus(str(file))
    assert len(list(corpus.documents(settled))) == 1
    listed = corpus.files(settled)
    file.write_bytes(as_jsonl([{"text": "two"}]))  # of the same size
    [piece] = corpus.plan(settled, listed, 0).slices
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since the run began"):
        list(corpus.read(settled, piece, Tally()))


def test_file_that_is_gone_before_it_is_cut_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SLICE_BYTES", 1)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), file)
    settled = files_corpus(str(file))
    listed = corpus.files(settled)
    file.unlink()
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: .*No such file"):
        corpus.plan(settled, listed, 0)


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
    [piece] = slices(settled)
    reading = corpus.read(settled, piece, Tally())
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


def test_every_stream_of_an_xz_file_is_read_or_refused(tmp_path):
    first, second = (lzma.compress(as_jsonl([row]) + b"\n") for row in ROWS)
    file = tmp_path / "a.jsonl.xz"
    file.write_bytes(first + b"\0" * 8 + second + b"\0" * 4)
    assert read(file) == [Document(**row) for row in ROWS]
    for damaged in (first + b"?" + second[1:], first + b"behind it", first + second[:-20], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.jsonl\.xz cannot be read"):
            read(file)


def test_empty_ids_are_none_in_every_kind_of_file(tmp_path):
    rows = [{"text": "one", "id": ""}, {"text": "two", "id": ""}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    assert [d.id for d in read(tmp_path / "a.jsonl")] == ["a.jsonl@0", "a.jsonl@26"]
    assert [d.id for d in read(tmp_path / "a.parquet")] == ["a.parquet:1", "a.parquet:2"]


@pytest.mark.parametrize("name", ["id", "url"])
def test_column_that_is_there_twice_is_refused(tmp_path, name):
    table = pa.Table.from_arrays([pa.array(["x"])] * 3, names=["text", name, name])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet has 2 columns '{name}': leave one"):
        read(tmp_path / "a.parquet")


def test_file_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_text("text")
    with pytest.raises(ValueError, match=r"a\\xff\.txt' is not UTF-8: rename it"):
        files_corpus(str(tmp_path / "*.txt"))


def test_suffixes_are_known_in_capitals_and_names_with_brackets_are_names(tmp_path):
    (tmp_path / "a[1].JSONL.GZ").write_bytes(gzip.compress(as_jsonl(ROWS)))
    assert [document.text for document in read(tmp_path / "a[1].JSONL.GZ")] == [
        row["text"] for row in ROWS
    ]
    with pytest.raises(ValueError, match=r"is a folder: name its files, as in .*\*\.jsonl"):
        files_corpus(str(tmp_path))


def test_ids_and_urls_may_be_numbers_or_absent_here_and_there(tmp_path):
    columns = {"text": ["a", "", "b", "c"], "id": [7, 8, None, 9], "url": ["u", "v", None, ""]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    documents = read(tmp_path / "a.parquet")
    assert documents == [
        Document("7", "a", "u"),
        Document("a.parquet:3", "b", ""),
        Document("9", "c", ""),
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_may_be_stored_in_any_of_arrows_string_types(tmp_path, kind):
    texts = pa.array(["one", "two", "one"]).cast(kind)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert [document.text for document in read(tmp_path / "a.parquet")] == ["one", "two", "one"]


def test_long_documents_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_READ_BYTES", 10_000)
    rows = [{"text": f"{i}" * 4000} for i in range(9)]
    for name, write in (("a.jsonl", as_jsonl), ("b.parquet", as_parquet)):
        (tmp_path / name).write_bytes(write(rows))
        config = files_corpus(str(tmp_path / name))
        [piece] = slices(config)
        sizes = [len(batch.texts) for batch in corpus.read(config, piece, Tally())]
        assert sizes == [3, 3, 3]
