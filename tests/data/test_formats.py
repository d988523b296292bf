"""Files are read through a corpus, as in a run, which names the file in every error."""

import bz2
import gzip
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import as_jsonl, files_corpus, read_files

from zeroflow.data import documents
from zeroflow.data.corpus import list_files
from zeroflow.data.documents import Document, Tally
from zeroflow.data.slices import plan_slices, read_slice


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
KINDS = ("txt", "jsonl", "parquet")
ROWS = [
    {"id": "a", "url": "https://example.org/a", "text": "one\ntwo é\u2028 "},
    {"id": "b", "url": "", "text": "three"},
]


def as_txt(rows: list[dict[str, str]]) -> bytes:
    return rows[0]["text"].encode()


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


@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_of_every_kind_are_read_plain_and_compressed(tmp_path, suffix):
    for kind, write in ((".txt", as_txt), (".jsonl", as_jsonl), (".parquet", as_parquet)):
        (tmp_path / f"file{kind}{suffix}").write_bytes(COMPRESS[suffix](write(ROWS)))
    whole = [Document(**row) for row in ROWS]
    assert read_files(tmp_path / f"*.jsonl{suffix}") == whole
    assert read_files(tmp_path / f"*.parquet{suffix}") == whole
    assert read_files(tmp_path / f"*.txt{suffix}") == [
        Document(f"file.txt{suffix}", ROWS[0]["text"])
    ]


def test_documents_without_id_are_named_after_their_file_and_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text(
        '{"text": "one"}\n\n{"text": "two", "id": 3}\n{"text": "x"}'
    )
    (tmp_path / "b.parquet").write_bytes(as_parquet([{"text": "three"}, {"text": "four"}]))
    ids = [document.id for document in read_files(tmp_path / "**" / "*.*")]
    assert ids == ["a/x.jsonl@0", "3", "a/x.jsonl@42", "b.parquet:1", "b.parquet:2"]


def test_empty_documents_are_left_out(tmp_path):
    rows = [{"text": "one"}, {"text": ""}, {"text": None}, {"text": "two"}]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    (tmp_path / "b.txt").write_text("")
    assert [document.text for document in read_files(tmp_path / "*")] == ["one", "two"]


def test_text_may_be_in_another_column(tmp_path):
    rows = [{"body": "one", "id": "a"}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    (tmp_path / "b.parquet").write_bytes(as_parquet(rows))
    assert read_files(tmp_path / "*", text_column="body") == [Document("a", "one")] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
        (
            "a.jsonl",
            b'\xef\xbb\xbf{"text": "x"}\n {"text": "\xe9"}\n',
            r"a\.jsonl, line 2 is not UTF-8: byte 28 is 0xe9: convert the file.*iconv -f ISO-8859",
        ),
        ("a.jsonl", '{"text": 1}\n'.encode("utf-16"), r"line 1 is not UTF-8.*iconv -f UTF-16"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl, line 1 has no text.*'body'.*--text-column"),
        (
            "a.jsonl",
            b'{"text": {}, "body": "x"}',
            r"line 1 has no text in field 'text', but a value of type dict.*\['body'\]",
        ),
        ("a.jsonl", b'{"text": 1}', r"line 1 has no text.* type int, and no other field has text"),
        ("a.jsonl", b'{"text": "x"}\n[1]', r"a\.jsonl, line 2 is JSON of type list, not an object"),
        (
            "a.json",
            b'[{"text": "x"}]',
            r"a\.json begins with a JSON array, .*: convert it",
        ),
        ("a.json", b'\n [\n {"text": "x"}\n]', r"a\.json begins with a JSON array"),
        *((f"a.{k}{c}", b"", rf"a\.{k}\{c} cannot be read") for k in KINDS for c in COMPRESS if c),
        ("a.txt", "é".encode("utf-16-le"), r"a\.txt is not UTF-8: byte 0 is 0xe9: convert"),
        ("a.txt", b"\xef\xbb\xbfa\xe9 b", r"a\.txt is not UTF-8: byte 4 is 0xe9: convert"),
        ("a.txt", "a".encode("utf-16"), r"a\.txt is not UTF-8: byte 0 .*`iconv -f UTF-16 -t UTF-8"),
        ("a.txt.gz", gzip.compress(b"\x80", mtime=0), r"a\.txt\.gz is not UTF-8: byte 0 is 0x80"),
        ("a.txt.gz", b"this is no gzip", r"a\.txt\.gz"),
        ("a.jsonl.xz", b"this is no xz", r"a\.jsonl\.xz"),
        ("a.txt.zst", COMPRESS[".zst"](b"text" * 999)[:-9], r"a\.txt\.zst"),
        ("a.parquet", b"this is no parquet", r"a\.parquet"),
        (
            "a.parquet",
            as_parquet([{"body": "x"}]),
            r"a\.parquet must have exactly one column 'text', but has .*'body'",
        ),
        *(
            ("a.parquet", not_utf8(c), rf"a\.parquet, row 1 .* byte 0 of its '{c}' is 0xff")
            for c in ("id", "url", "text")
        ),
        (
            "a.parquet",
            as_parquet([{"text": b"good"}, {"text": b"b\xe9d"}]),
            r"a\.parquet, row 2 \(in row group 0, .*\) is not UTF-8: byte 1 of its 'text' is 0xe9",
        ),
        (
            "a.parquet",
            as_parquet([{"text": {"body": "x"}}]),
            r"a\.parquet has struct.* fields in nested columns are not read",
        ),
        (
            "a.parquet",
            as_parquet([{"text": 1}]),
            r"a\.parquet has int64 in column 'text', not text",
        ),
    ],
)
def test_file_whose_content_does_not_match_its_name_is_refused_by_name(
    tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path / name)


def test_text_of_a_parquet_file_may_be_in_a_binary_column(tmp_path):
    texts = pa.array([b"one", None, "twö".encode()])
    for column in (texts, texts.cast(pa.large_binary()), texts.dictionary_encode()):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert [found.text for found in read_files(tmp_path / "a.parquet")] == ["one", "twö"]


def test_bad_lines_are_left_out_counted_and_reported_up_to_a_limit(tmp_path):
    lines = [b'{"text": "one"}', b"{", b'{"body": 1}', b'{"text": "two"}', b"", b"\xff"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    config = files_corpus(str(tmp_path / "a.jsonl"), bad_lines_limit=3)
    tally = Tally()
    [piece] = plan_slices(config, list_files(config), 0).slices
    assert [batch.texts for batch in read_slice(config, piece, tally)] == [["one", "two"]]
    assert tally.bad_lines == 3
    for place, reason in zip(
        tally.bad_places, ("2 is not JSON", "3 has no text", "6 is"), strict=True
    ):
        assert f"a.jsonl, line {reason}" in place
    strict = config.replace(bad_lines_limit=2)
    with pytest.raises(ValueError, match=r"line 6 is not UTF-8.*3 bad lines, --bad-lines-limit 2"):
        list(read_slice(strict, piece, Tally()))


@pytest.mark.parametrize("name", ["text", "id", "url"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_rows_that_are_not_utf8_are_bad_lines(tmp_path, kind, name):
    rows = [b"one", b"", b"b\xe9d", "twö".encode(), b"\xff", b"three"]
    columns = {"text": pa.array([b"0", b"1", b"2", b"3", b"4", b"5"]), name: pa.array(rows)}
    # Only a view, as a cast would check the strings; a writer of another language does not
    table = pa.table(
        {each: values.view(pa.string()).cast(kind, safe=False) for each, values in columns.items()}
    )
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, row_group_size=2, use_dictionary=name == "url")
    config = files_corpus(str(file), bad_lines_limit=2)
    tally = Tally()
    [piece] = plan_slices(config, list_files(config), 0).slices
    [batch] = read_slice(config, piece, tally)
    known = {"text": ["one", "twö", "three"]}.get(name, ["0", "1", "3", "5"])
    assert batch.texts == known
    ids = [document.id for document in batch.documents()]
    unnamed = [1, 4, 6] if name == "text" else [1, 2, 4, 6]
    assert ids == (
        ["one", "a.parquet:2", "twö", "three"]
        if name == "id"
        else [f"a.parquet:{row}" for row in unnamed]
    )
    assert tally.bad_lines == 2 and tally.empty == (name == "text")
    third, fifth = tally.bad_places
    assert "a.parquet, row 3 (in row group 1, counted from 0) is not UTF-8: byte 1 of its " in third
    assert "a.parquet, row 5 (in row group 2, counted from 0) is not UTF-8: byte 0 of its " in fifth
    with pytest.raises(ValueError, match=r"row 5 .*2 bad lines, --bad-lines-limit 1"):
        list(read_slice(config.replace(bad_lines_limit=1), piece, Tally()))


def test_damaged_page_of_a_parquet_file_is_detected_if_the_file_has_checksums(tmp_path):
    rows = [{"text": f"text {i}" * 9} for i in range(500)]
    file = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: .*checksum"):
        read_files(file)


def test_every_stream_of_an_xz_file_is_read_or_refused(tmp_path):
    first, second = (lzma.compress(as_jsonl([row]) + b"\n") for row in ROWS)
    file = tmp_path / "a.jsonl.xz"
    file.write_bytes(first + b"\0" * 8 + second + b"\0" * 4)
    assert read_files(file) == [Document(**row) for row in ROWS]
    for damaged in (first + b"?" + second[1:], first + b"behind it", first + second[:-20], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.jsonl\.xz cannot be read"):
            read_files(file)


def test_empty_ids_count_as_missing_in_every_kind_of_file(tmp_path):
    rows = [{"text": "one", "id": ""}, {"text": "two", "id": ""}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    assert [d.id for d in read_files(tmp_path / "a.jsonl")] == ["a.jsonl@0", "a.jsonl@26"]
    assert [d.id for d in read_files(tmp_path / "a.parquet")] == ["a.parquet:1", "a.parquet:2"]


@pytest.mark.parametrize("name", ["id", "url"])
def test_column_that_exists_twice_is_refused(tmp_path, name):
    table = pa.Table.from_arrays([pa.array(["x"])] * 3, names=["text", name, name])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet has 2 columns '{name}': keep only one"):
        read_files(tmp_path / "a.parquet")


def test_ids_and_urls_may_be_numbers_or_missing_in_some_documents(tmp_path):
    columns = {"text": ["a", "", "b", "c"], "id": [7, 8, None, 9], "url": ["u", "v", None, ""]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read_files(tmp_path / "a.parquet") == [
        Document("7", "a", "u"),
        Document("a.parquet:3", "b", ""),
        Document("9", "c", ""),
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_may_be_stored_in_any_of_arrows_string_types(tmp_path, kind):
    texts = ["one", "two", "one"]
    table = pa.table({"text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [document.text for document in read_files(tmp_path / "a.parquet")] == texts


def test_long_documents_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 10_000)
    rows = [{"text": f"{i}" * 4000} for i in range(9)]
    for name, write in (("a.jsonl", as_jsonl), ("b.parquet", as_parquet)):
        (tmp_path / name).write_bytes(write(rows))
        config = files_corpus(str(tmp_path / name))
        [piece] = plan_slices(config, list_files(config), 0).slices
        sizes = [len(batch.texts) for batch in read_slice(config, piece, Tally())]
        assert sizes == [3, 3, 3]
