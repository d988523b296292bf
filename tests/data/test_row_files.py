import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from patience import HANG_SECONDS
from shard_sets import ALL
from tiny import contents

from zeroflow import artifacts
from zeroflow.data.build import build_shards


def test_files_have_the_documented_schema_and_one_batch_each(shards):
    assert shards.parts > 3
    files = sorted(shards.path.rglob("*.arrow"))
    for file in files:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        assert reader.num_record_batches == 1
        [field] = reader.schema
        assert field.name == "tokens" and not field.nullable
        assert field.type == pa.list_(pa.field("item", pa.int32(), nullable=False), 33)
        batch = reader.get_batch(0)
        assert 0 < batch.num_rows <= 20
        # lies uncompressed in the file: reading a row allocates nothing
        assert batch.column(0).flatten().to_numpy(zero_copy_only=True).dtype == np.int32
    for field in pq.read_schema(shards.part_paths[0] / "documents.parquet"):
        assert not field.nullable, field


def test_files_do_not_depend_on_the_size_of_the_pieces_that_are_written(
    small_pieces, text, tmp_path, monkeypatch
):
    whole = build_shards(ALL, *text[:2], tmp_path / "whole")
    monkeypatch.setattr(artifacts, "WRITE_BYTES", 1000)
    pieces = build_shards(ALL, *text[:2], tmp_path / "pieces")
    for mine, theirs in zip(pieces.part_paths, whole.part_paths, strict=True):
        assert contents(mine) == contents(theirs)


def test_arrow_uses_the_systems_allocator_with_any_import_order():
    code = "import sys; sys.path.insert(0, 'flows'); import pretrain, pyarrow as pa; "
    code += "sys.exit(pa.default_memory_pool().backend_name)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=HANG_SECONDS
    )
    assert done.stderr.splitlines()[-1] == "system"
