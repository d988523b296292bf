"""The processes of the ranks, and the part of their output that is logged."""

import logging
import os
import sys
import threading
from pathlib import Path

import pytest
from patience import wait_until

from zeroflow.training import processes as processes_module
from zeroflow.training.processes import RankProcesses

SAYS = """
import logging, sys
from zeroflow.training import rank_program
rank_program.log_to_parent(rank=int(sys.argv[1]))
for level in ("info", "warning", "error"):
    getattr(logging.getLogger("zeroflow.some"), level)(level)
print("printed")
"""


def started(script: str, *arguments: str) -> RankProcesses:
    ranks = RankProcesses()
    for argument in arguments:
        ranks.start([sys.executable, "-c", script, argument], dict(os.environ))
    return ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_logs_everything_and_others_log_warnings(rank, caplog):
    caplog.set_level(logging.DEBUG, logger="zeroflow")
    ranks = started(SAYS, str(rank))
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
import sys, time
from pathlib import Path

if sys.argv[1] == "1":
    sys.exit(1)
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("writing", "code"), [(True, 0), (False, None)])
def test_rank_that_writes_a_checkpoint_is_waited_for(
    writing, code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It ends when a file is there, long after the others would have been killed."""
    monkeypatch.setattr(processes_module, "GRACE_SECONDS", 0.2)
    end = tmp_path / "end"
    if writing:
        (tmp_path / "checkpoints" / ".step-00000001.partial").mkdir(parents=True)
        threading.Timer(1.0, end.touch).start()
    ranks = started(ENDS_WITH_A_FILE, str(end), "1")
    wait_until(lambda: ranks.exit_codes()[1] is not None)
    assert ranks.end_after_failure(tmp_path / "checkpoints") == [code, 1]
    assert None not in ranks.exit_codes()
