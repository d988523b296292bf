import subprocess
import sys

import numpy as np
import pyarrow as pa

from zeroflow.data import arrays

COLUMN = pa.chunked_array([["train"], ["validation", "train"], []], pa.string())
NUMBERS = pa.chunked_array([[3, 1], [4, 1, 5]], pa.int32())


def test_columns_are_read_as_pyarrow_reads_them():
    for column in (NUMBERS, NUMBERS.slice(1, 3), NUMBERS.slice(5)):
        found = arrays.whole_numbers(column)
        assert found.dtype == np.int32
        assert found.tolist() == column.to_pylist()
    assert arrays.equals(COLUMN, "train").tolist() == [True, False, True]
    assert arrays.equals(COLUMN.slice(1), "train").tolist() == [False, True]
    assert arrays.equals(COLUMN.slice(3), "train").tolist() == []


def test_arrays_are_created_and_read_without_pandas():
    code = """
import sys
import numpy as np
import pyarrow as pa
from zeroflow.data import arrays
table = pa.table({"a": arrays.numbers(np.arange(3), pa.int64()), "b": arrays.strings("xyz")})
assert arrays.whole_numbers(table["a"]).sum() == 3
assert arrays.equals(table["b"], "y").sum() == 1
assert "pandas" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
