from itertools import combinations

import pytest
from public_tokenizers import of_bytes, save
from shard_sets import ALL, SMALL, SYNTHETIC, rows_of, synthetic_tokenizer, table_of
from tiny import jsonl_corpus
from tokenizers import Tokenizer, models, pre_tokenizers

from zeroflow.data.build import build_shards
from zeroflow.data.validation_sample import count_sample, sampled_units, validation_rows


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


def test_rows_that_share_a_document_are_one_sampled_unit(text, tmp_path):
    shards = build_shards(ALL.replace(validation_fraction=0.5), *text[:2], tmp_path)
    rows = validation_rows(shards, 20)
    units = sampled_units(shards, rows).tolist()
    joined = {
        (a, b)
        for line in documents_of_validation(shards)
        for a, b in combinations(sorted({*line} & {*rows.tolist()}), 2)
    }
    place = {row: number for number, row in enumerate(rows.tolist())}
    assert joined and all(units[place[a]] == units[place[b]] for a, b in joined)
    # As many units as the graph of these pairs has components
    groups = {row: {row} for row in place}
    for a, b in joined:
        both = groups[a] | groups[b]
        groups |= dict.fromkeys(both, both)
    assert len({*units}) == len({frozenset(group) for group in groups.values()}) > 1
    assert sorted({*units}) == list(range(len({*units})))


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


@pytest.mark.parametrize("space", [True, False])
def test_space_that_a_tokenizer_adds_before_a_document_has_no_bytes(text, tmp_path, space):
    tokenizer = of_bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    counts, scored = counted(tokenizer, ["x"] * 400, text, tmp_path)
    letters = sum(tokenizer.id_to_token(token).endswith("x") for token in scored)
    assert counts.text_bytes == letters > 50
    assert counts.unknown == 0 and counts.without_unknown == ""


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
    return count_sample(shards, described, 10**6), scored


def test_synthetic_data_has_no_bytes(tmp_path):
    tokenizer = synthetic_tokenizer(300)
    shards = build_shards(SMALL, SYNTHETIC, tokenizer, tmp_path)
    counts = count_sample(shards, tokenizer, 4)
    assert counts.text_bytes is None and counts.bytes_per_token is None and counts.unknown is None
    assert counts.rows == 4 and counts.documents
