"""The processes of the ranks, and what of their output is logged."""

import logging
import os
import sys
import time
from pathlib import Path

import pytest

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
    while ranks.exit_codes() == [None]:
        time.sleep(0.05)
    ranks.read_to_end()
    heard = [(record.levelname, record.getMessage()) for record in caplog.records]
    if rank:
        logged = [("WARNING", "rank 1: warning"), ("ERROR", "rank 1: error")]
    else:
        logged = [("INFO", "info"), ("WARNING", "warning"), ("ERROR", "error")]
    assert [line for line in heard if line[0] != "DEBUG"] == logged
    assert ("DEBUG", "printed") in heard
    assert "printed" in ranks.last_output


@pytest.mark.parametrize(("writing", "code"), [(True, 0), (False, None)])
def test_rank_that_writes_a_checkpoint_is_waited_for(
    writing, code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processes_module, "_GRACE_SECONDS", 0.2)
    if writing:
        (tmp_path / "checkpoints" / ".step-00000001.partial").mkdir(parents=True)
    script = "import sys, time; rank = int(sys.argv[1]); time.sleep(1.5 - 1.5 * rank); exit(rank)"
    ranks = started(script, "0", "1")
    while ranks.exit_codes()[1] is None:
        time.sleep(0.01)
    assert ranks.end_after_failure(tmp_path / "checkpoints") == [code, 1]
    assert None not in ranks.exit_codes()
