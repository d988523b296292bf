import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from patience import HANG_SECONDS, wait_until

from zeroflow.orchestration.programs import Program

WAITS = "import signal, time; print('there', flush=True); time.sleep(3600)"


def start(code: str, log: Path) -> Program:
    command = [sys.executable, "-c", code]
    return Program("the program", command, environment=os.environ, log=log)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def there(log: Path) -> bool:
    return "there" in log.read_text()


def test_program_is_stopped_at_once(tmp_path):
    log = tmp_path / "log"
    program = start(WAITS, log)
    program.wait_until(lambda: there(log), HANG_SECONDS)
    program.require_running()
    assert program.stop(HANG_SECONDS)
    assert not psutil.pid_exists(program.pid)


def test_program_that_does_not_stop_is_killed(tmp_path):
    log = tmp_path / "log"
    deaf = WAITS.replace("print", "signal.signal(signal.SIGTERM, signal.SIG_IGN); print")
    program = start(deaf, log)
    program.wait_until(lambda: there(log), HANG_SECONDS)
    assert not program.stop(0.5)
    assert not psutil.pid_exists(program.pid)


def test_program_receives_sigint_like_one_started_by_hand(tmp_path):
    log = tmp_path / "log"
    program = start(WAITS, log)
    program.wait_until(lambda: there(log), HANG_SECONDS)
    os.kill(program.pid, signal.SIGINT)
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        program.wait_until(lambda: False, HANG_SECONDS)
    assert program.stop(HANG_SECONDS)


def test_program_receives_sigint_even_if_its_owner_ignores_it(tmp_path):
    """As a shell makes every program ignore it that is started in the background."""
    log = tmp_path / "log"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = start(WAITS, log)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        program.wait_until(lambda: there(log), HANG_SECONDS)
        os.kill(program.pid, signal.SIGINT)
        with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
            program.wait_until(lambda: False, 60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert program.stop(HANG_SECONDS)


def test_end_of_a_program_is_reported_with_its_last_lines(tmp_path):
    program = start("print('a'); raise SystemExit(3)", tmp_path / "log")
    with pytest.raises(
        RuntimeError, match=r"the program has ended with exit code 3\. Last lines of .*log:\na"
    ):
        program.wait_until(lambda: False, HANG_SECONDS)
    with pytest.raises(RuntimeError, match="exit code 3"):
        program.wait_for_end(HANG_SECONDS)
    assert program.stop(HANG_SECONDS)


def test_last_lines_are_shown_without_a_log_file():
    """As of the Prefect server of a run; what is told does not move the place of the next line."""
    code = "import sys; print('a', flush=True); sys.stdin.read(); print('b'); sys.exit('it broke')"
    program = Program("it", [sys.executable, "-c", code], environment=os.environ)
    with pytest.raises(RuntimeError, match=r"^it was not ready within 0 s\. Its last lines:"):
        program.wait_until(lambda: False, 0)
    message = r"^it has ended with exit code 1\. Its last lines:\na\nb\nit broke$"
    with pytest.raises(RuntimeError, match=message):
        program.wait_until(lambda: False, HANG_SECONDS)


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
program.wait_until(lambda: "there" in log.read_text(), 900)
print(program.pid, flush=True)
time.sleep(3600)
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
    wait_until(lambda: is_gone(pid))
