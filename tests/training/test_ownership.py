"""One process at a time works on a run."""

import pytest

from zeroflow.training.failures import RunIsBusy
from zeroflow.training.ownership import ownership


def test_directory_has_one_owner_until_its_block_ends(tmp_path):
    with ownership() as acquire, ownership() as other:
        acquire(tmp_path / "run")
        acquire(tmp_path / "run")
        with pytest.raises(RunIsBusy, match="another process is working on run run"):
            other(tmp_path / "run")
        other(tmp_path / "another")
    with ownership() as acquire:
        acquire(tmp_path / "run")
