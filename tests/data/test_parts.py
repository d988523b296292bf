import random
from pathlib import Path

import pytest
from shard_sets import SMALL
from tiny import apart_from_reuse, contents

from zeroflow.data import parts
from zeroflow.data.build import build_shards


def flip_a_bit(folder: Path) -> None:
    rng = random.Random(1)
    file = rng.choice(sorted(folder.glob("*.arrow")))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = folder / "train-00000.arrow"
    file.write_bytes(file.read_bytes()[:-64])


DAMAGES = {
    "bit flip": flip_a_bit,
    "truncated": truncate,
    "missing": lambda folder: (folder / "train-00000.arrow").unlink(),
    "extra": lambda folder: (folder / "train-00099.arrow").write_bytes(b"x"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"files": {'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_part_is_set_aside_and_rebuilt_to_the_same_bytes(
    small_pieces, text, tmp_path, damage
):
    config = SMALL.replace(train_rows=400)
    shards = build_shards(config, *text[:2], tmp_path)
    part = shards.part_paths[1]
    before = contents(part)
    DAMAGES[damage](part)
    damaged = contents(part)
    assert damaged != before

    again = build_shards(config, *text[:2], tmp_path)
    assert not again.reused and apart_from_reuse(again) == apart_from_reuse(shards)
    reused = f"{shards.parts - 1} of {shards.parts} parts reused"
    assert again.why == f"{reused}: part-00001 was damaged and is set aside"
    assert contents(part) == before
    assert contents(part.with_name(part.name + ".damaged-1")) == damaged


def test_all_of_many_flipped_bits_are_noticed(small_pieces, text, tmp_path):
    part = build_shards(SMALL, *text[:2], tmp_path).part_paths[0]
    rng = random.Random(0)
    files = sorted(path for path in part.iterdir())
    for _ in range(100):
        file = rng.choice(files)
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        assert parts.existing_part(part) is None, file
        file.write_bytes(content)
    assert parts.existing_part(part) is not None
