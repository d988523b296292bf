"""The report of a rank that fails."""

import errno
import os
from pathlib import Path

import pytest

from zeroflow.training import failures

RUN = Path("cache/runs/mine")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("file", [None, "cache/runs/mine/metrics.jsonl"])
def test_full_disk_or_quota_is_reported_with_its_place_and_a_remedy(number, file):
    message = failures.message(OSError(number, os.strerror(number), file), RUN)
    assert message.startswith(f"{os.strerror(number)}, writing to {file or RUN}: free some")
    assert "--cache-dir" in message


def test_other_system_errors_name_their_file_and_our_own_are_unchanged():
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "shards/part-00000")
    assert failures.message(missing, RUN) == "No such file or directory: shards/part-00000"
    known_before = OSError(errno.ENOSPC, "a checkpoint takes 2 GB and there is 1 GB: free some")
    assert failures.message(known_before, RUN) == known_before.strerror
    assert failures.message(ValueError("wrong"), RUN) == "wrong"
    assert failures.message(KeyError("name"), RUN) == "KeyError: 'name'"


@pytest.mark.parametrize("error", ["No working C++ compiler found in", "Failed to find C compiler"])
def test_missing_compiler_is_reported_with_what_to_install(error):
    assert "install gcc and g++" in failures.message(RuntimeError(error), RUN)
