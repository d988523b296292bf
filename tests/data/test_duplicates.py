from shard_sets import ALL, SMALL, SYNTHETIC, documents_of, synthetic_tokenizer
from tiny import jsonl_corpus

from zeroflow.data.build import build_shards
from zeroflow.data.builders import in_threads


def test_duplicates_are_left_out_on_request_in_any_part(small_pieces, text, tmp_path):
    texts = [*text.texts[:20], *text.texts[:20], *text.texts[20:40], text.texts[25]]
    twice = jsonl_corpus(tmp_path / "twice.jsonl", texts)
    plain = build_shards(ALL, twice, text.tokenizer, tmp_path)
    assert (plain.documents, plain.duplicates) == (61, 0)
    alone = twice.replace(deduplicate=True)
    with in_threads(3) as builders:
        once = build_shards(ALL, alone, text.tokenizer, tmp_path, builders=builders)
    assert once.path != plain.path and once.parts > 3
    assert (once.documents, once.duplicates) == (40, 21)
    names = {f"d{i}" for i in (*range(20), *range(40, 60))}
    assert set(documents_of(once)) == names, "the first of its kind is kept"


def test_synthetic_data_has_no_duplicates_to_leave_out(tmp_path):
    corpus = SYNTHETIC.replace(deduplicate=True)
    shards = build_shards(SMALL, corpus, synthetic_tokenizer(300), tmp_path)
    assert shards.documents > 1000 and shards.duplicates == 0
