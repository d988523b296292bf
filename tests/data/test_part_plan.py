import shutil

import numpy as np
import pytest
from shard_sets import ALL, SMALL, SYNTHETIC, digests, synthetic_tokenizer
from tiny import apart_from_reuse, contents, files_corpus, jsonl_corpus

from zeroflow.data import slice_pages
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import list_files
from zeroflow.data.part_plan import PLAN, ShardPlan
from zeroflow.data.slice_pages import SlicePage, SlicePages
from zeroflow.data.slices import all_slices


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


def test_slices_are_the_same_for_any_length_of_pages_and_any_first_number(
    small_pieces, text, tmp_path, monkeypatch
):
    for name in range(6):  # a slice for some files, several for others
        jsonl_corpus(tmp_path / "texts" / f"{name}.jsonl", text.texts[: 10 * name + 3])
    corpus = files_corpus(f"{tmp_path}/texts/*")
    expected = list(all_slices(corpus))
    assert len(expected) > 10
    for length in (1, 2, 5, 1000):
        monkeypatch.setattr(slice_pages, "PAGE_SLICES", length)
        folder = tmp_path / f"pages of {length}"
        begin = SlicePage(first=0, next_file=0, slices=())

        def pages(folder=folder, begin=begin) -> SlicePages:
            return SlicePages(folder, corpus, list_files(corpus), begin)

        assert pages().slice(len(expected)) is None, "planned in one go"
        written = contents(folder)
        assert (len(written) == 1) == (length == 1000)
        for number in reversed(range(len(expected))):
            assert pages().slice(number) == expected[number]
        one_by_one = pages()
        assert [one_by_one.slice(n) for n in range(len(expected))] == expected
        assert contents(folder) == written
        damaged = sorted(folder.iterdir())[len(written) // 2]
        damaged.write_text("{")
        assert pages().slice(len(expected) - 1) == expected[-1]
        assert [pages().slice(n) for n in range(len(expected))] == expected
        assert contents(folder) == written, "a damaged page is planned again"


@pytest.mark.parametrize("files", [1, 3])
def test_first_page_is_in_the_plan_unless_there_are_many_files(
    small_pieces, text, tmp_path, monkeypatch, files
):
    for name, some in enumerate(np.array_split(text.texts, files)):
        jsonl_corpus(tmp_path / "texts" / f"{name}.jsonl", some.tolist())
    corpus = files_corpus(f"{tmp_path}/texts/*")
    whole = build_shards(ALL, corpus, text.tokenizer, tmp_path / "whole")
    assert not list(whole.path.glob("slices-*"))
    monkeypatch.setattr(slice_pages, "PAGE_SLICES", 2)
    paged = build_shards(ALL, corpus, text.tokenizer, tmp_path / "paged")
    assert list(paged.path.glob("slices-*")) or files == 1
    assert bool(ShardPlan.read(paged.path).slices) == (files <= 2)
    assert digests(paged) == digests(whole)
    shutil.copyfile(whole.path / PLAN, paged.path / PLAN)
    shutil.rmtree(paged.part(paged.parts - 1))
    again = build_shards(ALL, corpus, text.tokenizer, tmp_path / "paged")
    assert digests(again) == digests(whole), "a plan of an earlier version has all slices"
