import numpy as np
import pytest
from public_tokenizers import of_bytes, save
from shard_sets import ALL, SMALL, SYNTHETIC, rows_of, synthetic_tokenizer, table_of
from tiny import jsonl_corpus
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from zeroflow.data.build import build_shards
from zeroflow.data.validation_sample import count_sample, draw_sample, validation_rows


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
    counts = count_sample(shards, text.tokenizer, draw_sample(shards, 20))
    assert counts.rows == 20 and counts.documents <= len(set(first))
    rows = validation_rows(shards, 20)
    own = {
        number
        for number, line in enumerate(documents_of_validation(shards))
        if set(line) & set(rows.tolist())
    }
    assert counts.documents == len(own)


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_sample_knows_the_document_of_each_token(text, tmp_path, packing):
    config = ALL.replace(validation_fraction=0.5, packing=packing)
    shards = build_shards(config, *text[:2], tmp_path)
    sample = draw_sample(shards, 20)
    place = {row: number for number, row in enumerate(sample.rows.tolist())}
    expected = np.full_like(sample.documents, -1)
    number = -1
    for line in table_of(shards):
        if line["split"] == "validation":
            number += line["start"] == 0
            if line["row"] in place:
                positions = slice(line["offset"], line["offset"] + line["tokens"])
                expected[place[line["row"]], positions] = number
    found = sorted({*expected.flatten().tolist()} - {-1})
    renamed = {-1: -1, **{name: i for i, name in enumerate(found)}}
    assert sample.documents.tolist() == [[renamed[i] for i in row] for row in expected.tolist()]
    assert sample.sampled_documents == len(found) > 10


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
    counts = count_sample(shards, text.tokenizer, draw_sample(shards, 10**6))
    [part] = shards.part_paths
    rows = rows_of(part, "validation")
    decode, end = text.tokenizer.decoder(), shards.end_of_text
    # English in ASCII: a token's text has as many bytes wherever it stands
    first = sum(len(decode([row[0]])) for row in rows.tolist() if row[0] != end)
    assert counts.text_bytes == shards.validation.text_bytes - first
    begins_after_an_end = shards.validation.document_tokens - len(rows)
    assert counts.tokens == begins_after_an_end
    assert counts.documents == shards.validation.documents


@pytest.mark.parametrize("space", [True, False])
def test_space_that_a_tokenizer_adds_before_a_document_has_no_bytes(text, tmp_path, space):
    tokenizer = of_bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    counts, scored = counted(tokenizer, ["x"] * 400, text, tmp_path)
    letters = sum(tokenizer.id_to_token(token).endswith("x") for token in scored)
    assert counts.text_bytes == letters > 50
    assert counts.unknown == 0 and counts.without_unknown == ""


def test_spaces_that_decoding_adds_have_no_bytes(text, tmp_path):
    """BERT's tokenizers split Chinese into characters, and decode them with spaces."""
    words = ["<|endoftext|>", "[UNK]", *"天地玄黄宇宙洪荒"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.decoder = decoders.WordPiece()
    counts, scored = counted(tokenizer, ["天地玄黄宇宙洪荒"] * 400, text, tmp_path)
    assert counts.text_bytes == pytest.approx(3 * sum(token > 1 for token in scored), rel=0.01)
    assert counts.text_bytes > 1000


@pytest.mark.parametrize("unknown", ["<unk>", "�"])
def test_unknown_tokens_are_counted_but_not_the_bytes_of_their_name(text, tmp_path, unknown):
    model = models.WordLevel({"<|endoftext|>": 0, unknown: 1, "the": 2}, unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    counts, scored = counted(tokenizer, ["the old"] * 400, text, tmp_path)
    assert counts.text_bytes == len("the") * scored.count(2)
    assert counts.unknown == scored.count(1) > 50
    assert f"{counts.unknown / counts.tokens:.2%}" in counts.without_unknown


def counted(tokenizer, texts, text, tmp_path):
    """The counts of all held-out rows, and their ids except the first of each row."""
    folder = save(tmp_path / "tokenizer", tokenizer)
    described = text.tokenizer.replace(
        path=folder, end_of_text=tokenizer.token_to_id("<|endoftext|>"), encoder="tokenizers"
    )
    corpus = jsonl_corpus(tmp_path / "short.jsonl", texts)
    shards = build_shards(ALL.replace(validation_fraction=0.5), corpus, described, tmp_path)
    [part] = shards.part_paths
    scored = rows_of(part, "validation")[:, 1:].flatten().tolist()
    return count_sample(shards, described, draw_sample(shards, 10**6)), scored


def test_synthetic_data_has_no_bytes(tmp_path):
    tokenizer = synthetic_tokenizer(300)
    shards = build_shards(SMALL, SYNTHETIC, tokenizer, tmp_path)
    counts = count_sample(shards, tokenizer, draw_sample(shards, 4))
    assert counts.text_bytes is None and counts.bytes_per_token is None and counts.unknown is None
    assert counts.rows == 4 and counts.documents
