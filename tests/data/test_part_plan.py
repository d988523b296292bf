import pytest
from shard_sets import SMALL, SYNTHETIC, synthetic_tokenizer
from tiny import apart_from_reuse

from zeroflow.data.build import build_shards
from zeroflow.data.part_plan import PLAN


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan.replace('"below": 0.', '"below": 1.'),
        lambda plan: plan.replace('"next_file"', '"nextfile"'),
        lambda plan: plan[: len(plan) // 2],
        lambda plan: "",
        lambda plan: "null",
    ],
)
def test_damaged_plan_is_written_again(small_pieces, text, tmp_path, damage):
    shards = build_shards(SMALL, *text[:2], tmp_path)
    plan = shards.path / PLAN
    before = plan.read_text()
    plan.write_text(damage(before))
    assert plan.read_text() != before
    again = build_shards(SMALL, *text[:2], tmp_path)
    assert again.reused and apart_from_reuse(again) == apart_from_reuse(shards)
    assert plan.read_text() == before


def test_seed_counts_for_synthetic_data_only(text, tmp_path):
    def path(corpus, tokenizer, seed):
        return build_shards(SMALL, corpus, tokenizer, tmp_path, seed=seed).path

    assert path(*text[:2], 0) == path(*text[:2], 1)
    tokenizer = synthetic_tokenizer(300)
    assert path(SYNTHETIC, tokenizer, 0) != path(SYNTHETIC, tokenizer, 1)
