import numpy as np
import pytest

from zeroflow.artifacts import DamagedArtifact
from zeroflow.data import document_table, provenance, row_files, slices
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer

CONFIG = ShardConfig(seq_len=32, train_rows=10**6, validation_rows=10**6, validation_fraction=0.1)


@pytest.fixture
def shards(text, tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 15_000)
    monkeypatch.setattr(row_files, "SHARD_TOKENS", 20 * 33)
    return build_shards(CONFIG, *text[:2], tmp_path)


def test_pieces_are_the_documents_of_the_rows_token_by_token(shards, text):
    rows = np.random.default_rng(0).permutation(shards.train.rows)[:50]
    pieces = provenance.pieces(shards, text.tokenizer, rows)
    assert list(dict.fromkeys(piece.row for piece in pieces)) == rows.tolist(), "in their order"
    assert len({piece.part for piece in pieces}) > 2
    encoder, contents = text.tokenizer.load_encoder(), Rows(shards, "train")
    padding = {row: set(range(shards.row_tokens)) for row in rows.tolist()}
    for piece in pieces:
        whole = text.texts[int(piece.document[1:])]
        ids = [*encoder.encode([whole]).ids.tolist(), shards.end_of_text]
        held = contents[np.array([piece.row])][0, piece.offset : piece.offset + piece.tokens]
        assert held.tolist() == ids[piece.start : piece.start + piece.tokens]
        assert piece.words in " ".join(whole.split())
        if piece.start == 0:
            assert piece.words.startswith(f"Marker{int(piece.document[1:]):03}.")
        padding[piece.row] -= set(range(piece.offset, piece.offset + piece.tokens))
    for row, places in padding.items():
        assert set(contents[np.array([row])][0, sorted(places)]) <= {shards.end_of_text}


def test_documents_are_read_only_from_parts_with_the_rows(shards, text):
    last = np.array([shards.train.rows - 1])
    expected = provenance.pieces(shards, text.tokenizer, last)
    assert expected[0].part > 0
    for part, path in enumerate(shards.part_paths):
        if part != expected[0].part:
            (path / document_table.FILE).unlink()
    assert provenance.pieces(shards, text.tokenizer, last) == expected
    with pytest.raises(
        DamagedArtifact, match=r"part-00000.*documents.parquet is missing: run the com"
    ):
        provenance.pieces(shards, text.tokenizer, np.array([0]))
    (shards.part_paths[0] / document_table.FILE).write_bytes(b"PAR1")
    with pytest.raises(DamagedArtifact, match=r"cannot be read .*: run the command of"):
        provenance.pieces(shards, text.tokenizer, np.array([0]))


def test_repeated_row_is_listed_twice(shards, text):
    once = provenance.pieces(shards, text.tokenizer, np.array([3]))
    assert provenance.pieces(shards, text.tokenizer, np.array([3, 3])) == once * 2


def test_synthetic_documents_have_ids_and_token_ids_for_words(tmp_path):
    corpus = CorpusConfig(data_mode="synthetic")
    config = TokenizerConfig(tokenizer_name="synthetic", vocab_size=300)
    tokenizer = fetch_tokenizer(config, corpus, tmp_path)
    few = CONFIG.replace(train_rows=8, validation_rows=1)
    shards = build_shards(few, corpus, tokenizer, tmp_path)
    rows = np.array([5])
    row = Rows(shards, "train")[rows][0].tolist()
    for piece in provenance.pieces(shards, tokenizer, rows):
        assert piece.document.startswith("synthetic-") and piece.url == ""
        beginning = row[piece.offset :][: min(24, piece.tokens)]
        assert piece.words == " ".join(str(token) for token in beginning if token != 299)
