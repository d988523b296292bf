import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from tiny import contents

from zeroflow import artifacts
from zeroflow.data import local_copies
from zeroflow.data.local_copies import LocalCopies
from zeroflow.data.rows import Rows


@pytest.fixture
def copied(monkeypatch) -> Iterator[Counter]:
    """Number of times that each file was copied."""
    found, copy = Counter(), local_copies.shutil.copy2

    def noted(file, to):
        found[file] += 1
        return copy(file, to)

    monkeypatch.setattr(local_copies.shutil, "copy2", noted)
    return found


def test_rows_match_the_shared_folder_and_each_file_is_copied_once(shards, tmp_path, copied):
    plain, ids = Rows(shards, "train"), np.arange(shards.train.rows)
    for _ in range(2):  # two ranks, or the same one after a restart
        assert np.array_equal(Rows(shards, "train", local=tmp_path / "disk")[ids], plain[ids])
    files = set(shards.path.glob("*/train-*.arrow"))
    assert copied == dict.fromkeys(files, 1)
    here = contents(tmp_path / "disk" / shards.path.name)
    there = contents(shards.path)
    assert {n: data for n, data in here.items() if n.endswith(".arrow")}.items() <= there.items()


def test_file_that_was_rebuilt_is_copied_again(shards, tmp_path, copied):
    copies = LocalCopies(shards.path, tmp_path / "disk")
    file = next(shards.path.glob("*/train-*.arrow"))
    copy = copies.of(file)
    os.utime(file, ns=(0, 0))
    assert copies.of(file) == copy != file
    assert copied == {file: 2}


def test_original_is_read_while_another_rank_copies(shards, tmp_path):
    copies = LocalCopies(shards.path, tmp_path / "disk")
    file = next(shards.path.glob("*/train-*.arrow"))
    with artifacts.exclusive(tmp_path / "disk" / shards.path.name / "copying", waiting_for=None):
        assert copies.of(file) == file
    assert copies.of(file) != file


def test_no_files_are_copied_to_a_nearly_full_disk(shards, tmp_path, monkeypatch, caplog, copied):
    monkeypatch.setattr(local_copies, "_KEPT_FREE", 1.0)
    copies = LocalCopies(shards.path, tmp_path / "disk")
    for file in shards.path.glob("*/train-*.arrow"):
        assert copies.of(file) == file
    assert not copied and caplog.text.count("its disk is nearly full") == 1


def test_original_is_read_if_the_copies_lie_below_a_file(shards, tmp_path, caplog):
    (tmp_path / "disk").touch()
    copies = LocalCopies(shards.path, tmp_path / "disk")
    file = next(shards.path.glob("*/train-*.arrow"))
    assert copies.of(file) == file
    assert f"no more shards are copied to {tmp_path}/disk/{shards.path.name}: " in caplog.text
