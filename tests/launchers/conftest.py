"""A Slurm of two nodes."""

from collections.abc import Iterator

import pytest
from slurm_cluster import slurm


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield
