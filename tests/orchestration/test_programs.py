import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from zeroflow.orchestration.programs import Program

WAITS = "import signal, time; print('there', flush=True); time.sleep(60)"


def start(code: str, log: Path) -> Program:
    command = [sys.executable, "-c", code]
    return Program("the program", command, environment=os.environ, log=log)


def there(log: Path) -> bool:
    return "there" in log.read_text()


def test_program_is_stopped_at_once(tmp_path):
    log = tmp_path / "log"
    program = start(WAITS, log)
    program.wait_until(lambda: there(log), 20)
    program.require_running()
    assert program.stop(20)
    assert not psutil.pid_exists(program.pid)


def test_program_that_does_not_stop_is_killed(tmp_path):
    log = tmp_path / "log"
    deaf = WAITS.replace("print", "signal.signal(signal.SIGTERM, signal.SIG_IGN); print")
    program = start(deaf, log)
    program.wait_until(lambda: there(log), 20)
    assert not program.stop(0.5)
    assert not psutil.pid_exists(program.pid)


def test_program_hears_sigint_as_one_started_by_hand(tmp_path):
    log = tmp_path / "log"
    program = start(WAITS, log)
    program.wait_until(lambda: there(log), 20)
    os.kill(program.pid, signal.SIGINT)
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        program.wait_until(lambda: False, 20)
    assert program.stop(20)


def test_end_of_a_program_is_told_with_its_last_lines(tmp_path):
    program = start("print('a'); raise SystemExit(3)", tmp_path / "log")
    with pytest.raises(
        RuntimeError, match=r"the program has ended with exit code 3\. Last lines of .*log:\na"
    ):
        program.wait_until(lambda: False, 20)
    with pytest.raises(RuntimeError, match="exit code 3"):
        program.wait_for_end(20)
    assert program.stop(20)


def test_program_that_takes_too_long_is_ended(tmp_path):
    program = start(WAITS, tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"the program took more than 0\.5 s"):
        program.wait_for_end(0.5)
    assert not psutil.pid_exists(program.pid)


OWNER = """
import os, sys, time
from pathlib import Path
from zeroflow.orchestration.programs import Program
log = Path(sys.argv[1])
program = Program("p", [sys.executable, "-c", sys.argv[2]], environment=os.environ, log=log)
program.wait_until(lambda: "there" in log.read_text(), 20)
print(program.pid, flush=True)
time.sleep(60)
"""


def test_program_ends_with_an_owner_that_is_killed(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "log"), WAITS],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("it is still there")
