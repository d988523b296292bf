"""The processes of the ranks, and the part of their output that is logged."""

import logging
import os
import threading
from pathlib import Path

import pytest
from patience import wait_until

from zeroflow.run_folder import Cache
from zeroflow.training import processes as processes_module
from zeroflow.training.environment import Place
from zeroflow.training.processes import KeptRanks, RankProcesses, Task


@pytest.fixture
def script_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


SAYS = """
import logging
for level in ("info", "warning", "error"):
    getattr(logging.getLogger("zeroflow.some"), level)(level)
print("printed")
raise SystemExit(1)
"""


def started(script: str, folder: Path, *places: Place) -> RankProcesses:
    """Processes of ranks that import `script` instead of the program of a job."""
    (folder / "script.py").write_text(script)
    ranks = RankProcesses(KeptRanks().take(places, folder))
    ranks.begin(Task(module="script", job_file=folder / "job.json"))
    return ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_logs_everything_and_others_log_warnings(rank, caplog, script_folder):
    caplog.set_level(logging.DEBUG, logger="zeroflow")
    ranks = started(SAYS, script_folder, Place(rank, 2, None))
    wait_until(lambda: ranks.exit_codes() != [None])
    ranks.read_to_end()
    heard = [(record.levelname, record.getMessage()) for record in caplog.records]
    if rank:
        logged = [("WARNING", "rank 1: warning"), ("ERROR", "rank 1: error")]
    else:
        logged = [("INFO", "info"), ("WARNING", "warning"), ("ERROR", "error")]
    assert [line for line in heard if line[0] != "DEBUG"] == logged
    assert ("DEBUG", "printed") in heard
    assert "printed" in ranks.last_output


ENDS_WITH_A_FILE = """
import os, time
from pathlib import Path

if os.environ["RANK"] == "1":
    os._exit(1)
while not Path(__file__).with_name("end").exists():
    time.sleep(0.01)
os._exit(0)
"""


@pytest.mark.parametrize(("writing", "code"), [(True, 0), (False, None)])
def test_rank_that_writes_a_checkpoint_is_waited_for(
    writing, code, script_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """It ends when a file is there, long after the others would have been killed."""
    monkeypatch.setattr(processes_module, "GRACE_SECONDS", 0.2)
    if writing:
        threading.Timer(1.0, (script_folder / "end").touch).start()
    ranks = started(ENDS_WITH_A_FILE, script_folder, Place(0, 2, None), Place(1, 2, None))
    wait_until(lambda: ranks.exit_codes()[1] is not None)
    assert ranks.end_after_failure(lambda: writing) == [code, 1]
    assert None not in ranks.exit_codes()


def test_ranks_are_not_started_ahead_if_no_machine_has_as_many_gpus(tmp_path):
    kept = KeptRanks()
    kept.start_for_run(Cache(tmp_path), None, 100_000)
    assert kept.take([], tmp_path) == [] and kept._waiting == []
