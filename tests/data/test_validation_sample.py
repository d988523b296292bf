import numpy as np
import pytest
import tokenizers
from shard_sets import ALL, SMALL, SYNTHETIC, rows_of, synthetic_tokenizer, table_of
from tiny import jsonl_corpus
from tokenizers import decoders, models, normalizers, trainers

from zeroflow.data.build import build_shards
from zeroflow.data.token_bytes import token_bytes
from zeroflow.data.validation_sample import count_sample, validation_rows

TEXTS = [
    "The river runs past the old bridge.",
    "Ünïcode café 日本語 — 🙂\n\ttabs  and  spaces",
    "x",
]


def metaspace(texts):
    """A tokenizer like SentencePiece's: spaces as marks, and bytes for what it does not know."""
    trained = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces[:1], show_progress=False)
    for piece in pieces[1:]:
        trained.add_tokens([piece])
    trained.train_from_iterator(texts, trainer)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    for piece in sorted(trained.get_vocab(with_added_tokens=False)):
        vocabulary.setdefault(piece, len(vocabulary))
    fallback = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    fallback.normalizer, fallback.decoder = trained.normalizer, trained.decoder
    return fallback


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_bytes_of_a_texts_tokens_are_the_size_of_the_text(text, tmp_path, kind):
    tokenizer = text.tokenizer
    if kind == "metaspace":
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        metaspace(["only these letters"]).save(str(folder / "tokenizer.json"))
        tokenizer = tokenizer.replace(path=folder, end_of_text=0)
    for written in [*TEXTS, *text.texts[:5]]:
        ids = tokenizer.load().encode(written, add_special_tokens=False).ids
        sizes = token_bytes(tokenizer, np.array([*ids, tokenizer.end_of_text]))
        assert sizes.sum() == len(written.encode()), written
        assert sizes[-1] == 0


def test_sample_does_not_depend_on_the_number_of_parts_that_a_run_reads(
    small_pieces, text, tmp_path
):
    chosen = []
    for rows in (1, 100, 400):
        shards = build_shards(SMALL.replace(train_rows=rows), *text[:2], tmp_path)
        chosen.append((shards.parts, validation_rows(shards, 4).tolist()))
    assert chosen[0][0] < chosen[-1][0]
    assert chosen[0][1] == chosen[-1][1]
    assert set(validation_rows(shards, 2)) < set(chosen[0][1])
    assert len(validation_rows(shards, 10**6)) == shards.validation.rows


def test_sample_has_many_documents_although_one_fills_the_first_rows(text, tmp_path):
    long, short = "\n".join(text.texts), [words[:40] for words in text.texts[:40]]
    corpus = jsonl_corpus(tmp_path / "mixed.jsonl", [long, *short])
    held_out = ALL.replace(validation_fraction=0.5)
    shards = build_shards(held_out, corpus, text.tokenizer, tmp_path)
    first = [line["id"] for line in table_of(shards) if line["split"] == "validation"]
    counts = count_sample(shards, text.tokenizer, 20)
    assert counts.rows == 20 and counts.documents <= len(set(first))
    rows = validation_rows(shards, 20)
    own = {
        number
        for number, line in enumerate(documents_of_validation(shards))
        if set(line) & set(rows.tolist())
    }
    assert counts.documents == len(own)


def documents_of_validation(shards):
    """The validation rows that each held-out document lies in."""
    found = []
    for line in table_of(shards):
        if line["split"] == "validation":
            if line["start"] == 0:
                found.append([])
            found[-1].append(line["row"])
    return found


def test_bytes_are_those_of_exactly_the_tokens_that_are_scored(text, tmp_path):
    shards = build_shards(ALL, *text[:2], tmp_path)
    counts = count_sample(shards, text.tokenizer, 10**6)
    [part] = shards.part_paths
    rows = rows_of(part, "validation")
    decode, end = text.tokenizer.decoder(), shards.end_of_text
    # English in ASCII: a token's text has as many bytes wherever it stands
    first = sum(len(decode([row[0]])) for row in rows.tolist() if row[0] != end)
    assert counts.text_bytes == shards.validation.text_bytes - first
    begins_after_an_end = shards.validation.document_tokens - len(rows)
    assert counts.tokens == begins_after_an_end
    assert counts.documents == shards.validation.documents


def test_synthetic_data_has_no_bytes(tmp_path):
    tokenizer = synthetic_tokenizer(300)
    shards = build_shards(SMALL, SYNTHETIC, tokenizer, tmp_path)
    counts = count_sample(shards, tokenizer, 4)
    assert counts.text_bytes is None and counts.bytes_per_token is None
    assert counts.rows == 4 and counts.documents
