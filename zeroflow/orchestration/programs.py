"""Programs that end with this process, even if it is killed."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from zeroflow.artifacts import create_private
from zeroflow.text.redaction import redacted

_LAST_LINES = 15
"""Number of output lines in an error message."""

# The shell starts a watcher in the background and then becomes the program (exec). The watcher
# kills the program when its standard input closes, which happens whenever this process ends. The
# program must not be the background process, because a shell's background processes ignore SIGINT,
# with which Prefect's worker is stopped
_KEPT = 'exec 3<&0; (read -r _ <&3; kill $$) & exec "$@" </dev/null 3<&-'


class Program:
    """A running program that does not receive Ctrl-C.

    Args:
        name: name in messages.
        environment: environment variables, such as a login: all users can read the command line.
        log: file for the output, which is emptied first and only this user can read; None for a
            temporary file.
        umask: permissions that files of the program do not get; -1 for those of this process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path | None = None,
        umask: int = -1,
    ) -> None:
        self.name, self._log = name, log
        self._output = create_private(log) if log else tempfile.TemporaryFile()  # noqa: SIM115
        with _interruptible():
            self._process = subprocess.Popen(
                ["sh", "-c", _KEPT, "kept", *command],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
                env=environment,
                umask=umask,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def require_running(self) -> None:
        """
        Raises:
            RuntimeError: the program has ended; the message contains its last lines.
        """
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"{self.name} has ended with exit code {code}{self._last_lines()}")

    def wait_until(
        self, ready: Callable[[], bool], seconds: float, *, poll_seconds: float = 0.2
    ) -> None:
        """Wait until `ready()` is true.

        Raises:
            RuntimeError: the program ended, or was not ready in time; the message contains its last
                lines.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            self.require_running()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.name} was not ready within {seconds:g} s{self._last_lines()}"
                )
            time.sleep(poll_seconds)

    def wait_for_end(self, seconds: float) -> None:
        """Wait for the program to succeed.

        Raises:
            RuntimeError: the program failed or took too long; the message contains its last lines.
        """
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(seconds) == 0:
                return
        self.require_running()
        self.stop(0)
        raise RuntimeError(f"{self.name} took more than {seconds:g} s{self._last_lines()}")

    def stop(self, seconds: float) -> bool:
        """Stop the program, then all its remaining children.

        Returns:
            True if the program itself ended in time.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def _last_lines(self) -> str:
        # pread does not move the file position, at which the program continues to write
        size = os.fstat(self._output.fileno()).st_size
        content = os.pread(self._output.fileno(), size, 0).decode(errors="replace")
        source = f"Last lines of {self._log}" if self._log else "Its last lines"
        return "\n".join([f". {source}:", *redacted(content).splitlines()[-_LAST_LINES:]])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let programs that are started in the block receive SIGINT, even if this process ignores it.

    A shell's background process, as in `nohup zeroflow ui &`, ignores SIGINT, and its children
    would inherit that. Prefect's worker sends itself SIGINT when it has to stop.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *received: None)  # a handler is not inherited
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
