import pytest
from tiny import WORKLOAD

from zeroflow.estimate import disk
from zeroflow.estimate.disk import disk_speed
from zeroflow.estimate.history import Figures, Past

GB = 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(disk._Sample, "size", 2**20)
    disk._measured.cache_clear()


def saved(size: int, seconds: float | None) -> Past:
    measured = Figures(
        tokens_per_second=None,
        seconds=None,
        memory_bytes=None,
        shard_bytes=None,
        checkpoint_bytes=size,
        checkpoint_seconds=seconds,
    )
    return Past(run="a", steps=1, workload=WORKLOAD, predicted=measured, measured=measured)


def test_speed_of_a_disk_is_measured_once_and_leaves_no_file(tmp_path):
    rate, source = disk_speed(tmp_path / "cache" / "of a run", GB, [])
    assert rate > 0 and source.startswith("measured now")
    assert list(tmp_path.iterdir()) == []
    assert disk_speed(tmp_path / "cache", GB, []).bytes_per_second == rate


def test_earlier_checkpoints_of_similar_size_give_the_speed(tmp_path):
    runs = [saved(GB, 2.0), saved(2 * GB, 1.0), saved(GB // 10, 100.0), saved(GB, None)]
    assert disk_speed(tmp_path, GB, runs) == (0.8 * GB, "as in 2 earlier runs here")


def test_speed_is_unknown_where_it_does_not_matter_or_cannot_be_measured(tmp_path, monkeypatch):
    assert disk_speed(tmp_path, GB // 100, []).bytes_per_second is None

    def full(folder, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.chunked_files, "write", full)
    rate, source = disk_speed(tmp_path, GB, [])
    assert rate is None and "No space left on device" in source
