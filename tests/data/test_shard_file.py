import os
from pathlib import Path

import numpy as np
import pytest
from shard_sets import SMALL, rows_of

from zeroflow.artifacts import DamagedArtifact
from zeroflow.data.file_writer import FileWriter
from zeroflow.data.row_files import RowFiles
from zeroflow.data.rows import Rows
from zeroflow.data.shard_file import ShardFile


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def test_rows_are_those_that_plain_pyarrow_reads(shards):
    for part in shards.part_paths:
        found = [np.zeros((0, shards.row_tokens), np.int32)]
        for path in sorted(part.glob("train-*.arrow")):
            file = ShardFile(path)
            out = np.empty((file.rows, file.row_tokens), file.dtype)
            for row in range(file.rows):
                file.read_into(row, out[row])
            found.append(out)
        assert np.concatenate(found).tolist() == rows_of(part, "train").tolist()


def test_only_the_rows_that_are_asked_for_are_read_from_the_disk(tmp_path):
    """Of a mapped file, Linux read a hundred times as much, ahead of the row and around it."""
    path, layout = tmp_path / "train-00000.arrow", SMALL.replace(seq_len=2048).layout
    with FileWriter() as writer:
        files = RowFiles(tmp_path, "train", layout, writer, spare_rows=0)
        files.append(2000, fill=1)
        files.write_rest()
        writer.records()
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    before = bytes_from_disk()
    file, out = ShardFile(path), np.empty(2049, np.int32)
    for row in range(0, file.rows, 250):
        file.read_into(row, out)
    pages_at_its_ends = 2 * 4096
    assert bytes_from_disk() - before <= 8 * (out.nbytes + pages_at_its_ends) + pages_at_its_ends


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-900], "too few for"),
        (lambda content: content[:100], "cut short|cannot be read"),
        (lambda content: b"PAR1" + content[4:], "is not an Arrow file"),
        (lambda content: b"", "is not an Arrow file"),
    ],
)
def test_damaged_file_is_refused_with_its_remedy(shards, damage, message):
    path = shards.part_paths[0] / "train-00000.arrow"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedArtifact, match=rf"(?s)train-00000.*({message}).*run the command"):
        ShardFile(path)


def test_file_that_becomes_shorter_while_it_is_open_is_an_error_and_no_signal(shards):
    rows = Rows(shards, "train")
    assert rows[np.array([0])].any()
    path = shards.part_paths[0] / "train-00000.arrow"
    os.truncate(path, 600)
    with pytest.raises(DamagedArtifact, match="ends before its row"):
        rows[np.arange(20)]
