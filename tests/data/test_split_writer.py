import numpy as np
from shard_sets import ALL, rows_of, table_of
from tiny import jsonl_corpus

from zeroflow.data.build import build_shards
from zeroflow.data.shards import SPLITS


def test_positions_without_a_document_are_padding_and_are_counted(shards):
    for split in SPLITS:
        padding = 0
        for part, path in enumerate(shards.part_paths):
            rows = rows_of(path, split)
            free = np.ones(rows.shape, dtype=bool) if len(rows) else np.empty((0, 33), bool)
            for line in table_of(shards):
                if (line["part"], line["split"]) == (part, split):
                    place = free[line["row"], line["offset"] : line["offset"] + line["tokens"]]
                    assert place.all(), "no two documents overlap"
                    place[:] = False
            assert (rows[free] == shards.end_of_text).all() if len(rows) else True
            # which is all that a reader needs to tell it
            ends = rows == shards.end_of_text
            if len(rows):
                assert np.array_equal(free[:, 1:], ends[:, 1:] & ends[:, :-1])
            padding += int(free.sum())
        counts = getattr(shards, split)
        assert counts.padding_tokens == padding
        assert counts.rows * 33 == counts.document_tokens + padding


def test_best_fit_cuts_fewer_documents_than_concatenation(small_pieces, text, tmp_path):
    texts = [text[:90] for text in text.texts]
    short = jsonl_corpus(tmp_path / "short.jsonl", texts)
    cut = {
        name: build_shards(ALL.replace(packing=name), short, text.tokenizer, tmp_path).train
        for name in ("best-fit", "concat")
    }
    lengths = text.tokenizer.load_encoder().encode(texts).lengths + 1
    longer = np.count_nonzero(lengths > 33)
    assert cut["best-fit"].cut_documents <= longer < cut["concat"].cut_documents
