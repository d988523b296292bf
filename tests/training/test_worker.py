"""What a training process says when it fails."""

import errno
import os
from pathlib import Path

import pytest

from zeroflow.training import worker

RUN = Path("cache/runs/mine")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("file", [None, "cache/runs/mine/metrics.jsonl"])
def test_full_disk_or_quota_is_told_with_its_place_and_what_to_do(number, file):
    message = worker._message(OSError(number, os.strerror(number), file), RUN)
    assert message.startswith(f"{os.strerror(number)}, writing to {file or RUN}: free some")
    assert "--cache-dir" in message


def test_other_failures_of_the_system_name_their_file_and_ours_are_told_as_they_are():
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "shards/part-00000")
    assert worker._message(missing, RUN) == "No such file or directory: shards/part-00000"
    known_before = OSError(errno.ENOSPC, "a checkpoint takes 2 GB and there is 1 GB: free some")
    assert worker._message(known_before, RUN) == known_before.strerror
    assert worker._message(ValueError("wrong"), RUN) == "wrong"
    assert worker._message(KeyError("name"), RUN) == "KeyError: 'name'"


@pytest.mark.parametrize("error", ["No working C++ compiler found in", "Failed to find C compiler"])
def test_lack_of_a_compiler_says_what_to_install(error):
    assert "install gcc and g++" in worker._message(RuntimeError(error), RUN)
