"""Several ranks, when one of them ends or all are asked to stop."""

import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from meeting import PIDS
from patience import HANG_SECONDS, wait_until
from tiny import training_config

from zeroflow.run_folder import RunFolder
from zeroflow.training import launch as launch_module
from zeroflow.training import processes as processes_module
from zeroflow.training import zero
from zeroflow.training.environment import Place
from zeroflow.training.events import EVENTS, Event, Started
from zeroflow.training.failures import TrainingFailed, TrainingStopped
from zeroflow.training.job import RankJob
from zeroflow.training.launch import launch
from zeroflow.training.processes import RankProcess, Task


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "ä folder"
    folder.mkdir()
    paths = (Path(__file__).parents[1] / "helpers",)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = RankJob(run_dir=folder, training=training_config(ranks=2))
    given.write(folder / "job.json")
    (folder / "fate").write_text("none")
    (folder / ".rendezvous-before").touch()  # as of ranks that were killed with their parent
    return folder / "job.json"


def meet(job_file: Path, fate: str = "none", on_event=lambda event: None, **more) -> list[int]:
    """Launch two ranks, and see that none of them is left; their process ids."""
    folder = job_file.parent
    (folder / "fate").write_text(fate)
    try:
        launch("meeting", job_file, on_event, ranks=2, **more)
    finally:
        pids = pids_of(folder)
        assert not any(map(psutil.pid_exists, pids))
        assert not list(folder.glob(".rendezvous-*"))
    return pids


def pids_of(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / PIDS).read_text().split()]


@pytest.mark.slow  # the next one is harder
def test_rank_that_is_killed_ends_the_others_and_is_named(job_file):
    with pytest.raises(TrainingFailed, match=r"exit codes by rank: 0: .*, 1: -9") as failure:
        meet(job_file, "killed")
    assert failure.value.reason == "killed"


def test_killed_rank_is_detected_although_the_others_report_nothing(job_file, monkeypatch):
    monkeypatch.setattr(processes_module, "GRACE_SECONDS", 1.0)
    with pytest.raises(TrainingFailed, match=r"exit codes by rank: 0: none, 1: -9") as failure:
        meet(job_file, "killed while others are frozen")
    assert failure.value.reason == "killed"


def test_rank_that_loses_its_parent_before_the_rendezvous_does_not_wait(job_file):
    """They may be gone as well."""
    rank = RankProcess(Place(1, 2, None), job_file.parent)
    told = {zero.RENDEZVOUS: str(zero.rendezvous_file(job_file.parent))}
    rank.begin(Task(module="meeting", job_file=job_file, environment=told), deque())
    wait_until(lambda: list(job_file.parent.glob(".worker-1.lock")))
    rank.ask_to_stop()
    assert rank.process.wait(HANG_SECONDS) == 1


def test_rank_that_fails_ends_the_others_and_says_why(job_file):
    with pytest.raises(TrainingFailed, match="CUDA out of memory") as failure:
        meet(job_file, "out of memory")
    assert failure.value.reason == "out of memory"


@pytest.mark.slow
def test_hanging_rank_is_detected(job_file):
    with pytest.raises(TrainingFailed, match="made no progress for 30 s") as failure:
        meet(job_file, "hang", hang_seconds=30)  # a busy machine takes some to start them
    assert failure.value.reason == "hang"


def test_signal_to_one_rank_stops_all(job_file):
    def terminate(event: Event) -> None:
        if isinstance(event, Started):
            os.kill(pids_of(job_file.parent)[1], signal.SIGTERM)

    with pytest.raises(TrainingStopped, match="as asked for"):
        meet(job_file, on_event=terminate)


def test_ranks_whose_parent_is_killed_stop_together(job_file):
    folder = job_file.parent
    command = "import sys; from pathlib import Path; from zeroflow.training.launch import launch; "
    command += "f = Path(sys.argv[1]); launch('meeting', f, lambda event: None, ranks=2)"
    parent = subprocess.Popen([sys.executable, "-c", command, str(job_file)])
    wait_until(lambda: RunFolder(folder).events.exists())
    parent.kill()
    parent.wait()
    pids = pids_of(folder)
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))
    events = EVENTS.read(RunFolder(folder).events)
    assert [event.event for event in events] == ["started", "stopped"]


def test_rank_that_ends_without_disk_space_is_reported_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(TrainingFailed, match=r"the disk of .* has 0 bytes left") as failure:
        launch("no_such_module", tmp_path / "job.json", lambda event: None)
    assert failure.value.reason == "error"
