"""Programs that another one needs, which end when it does, however that comes about."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_LAST_LINES = 15

# A shell that outlives us by no more than it takes to stop the program: the end of its input is
# our end. Its reader is a child of its own, so that it also sees the program end first.
_KEEPER = """
exec 3<&0
"$@" </dev/null 3<&- & child=$!
(read -r _ <&3; kill "$child") 2>/dev/null & reader=$!
exec 3<&-
wait "$child"; code=$?
kill "$reader" 2>/dev/null
exit "$code"
"""


class Program:
    """A program that is running, out of reach of Ctrl-C.

    Args:
        name: of the program, to a person.
        log: file for its output, which is emptied; None for none.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name, self._log = name, log
        with (log or Path(os.devnull)).open("wb") as output:
            self._keeper = subprocess.Popen(
                ["sh", "-c", _KEEPER, "keeper", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=folder,
                env=environment,
            )

    @property
    def pid(self) -> int:
        """Of a process that all of the program's are children of."""
        return self._keeper.pid

    def require_running(self) -> None:
        """
        Raises:
            RuntimeError: it has ended; with its last lines.
        """
        if (code := self._keeper.poll()) is not None:
            raise RuntimeError(f"{self.name} has ended with exit code {code}{self._last_lines()}")

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """
        Raises:
            RuntimeError: it has ended before, or the time has; with its last lines.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            self.require_running()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.name} was not ready within {seconds:g} s{self._last_lines()}"
                )
            time.sleep(0.2)

    def wait_for_end(self, seconds: float) -> None:
        """
        Raises:
            RuntimeError: it has not ended well within the time; with its last lines.
        """
        with suppress(subprocess.TimeoutExpired):
            if self._keeper.wait(seconds) == 0:
                return
        self.require_running()
        self.stop(0)
        raise RuntimeError(f"{self.name} took more than {seconds:g} s{self._last_lines()}")

    def stop(self, seconds: float) -> bool:
        """Have it end, and all its children that are left then; whether it did so in time."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._keeper.wait()

    def _last_lines(self) -> str:
        if self._log is None:
            return ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"; the end of {self._log}:", *lines[-_LAST_LINES:]])
