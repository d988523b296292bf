"""How training stops: on SIGTERM, on Ctrl-C, or after the death of the parent process.

1. The flow's process turns SIGTERM into an exception, as Python does with SIGINT for Ctrl-C
   (`cli.console.terminate`). The signal is repeated if a library drops the exception
   (`interruption`). The exception reaches `launch`, which closes the standard input of the ranks
   and waits at most two minutes for them to end (`processes`).
2. Each rank has a `Parent`, which reads jobs from standard input, and for each job a `StopRequest`.
   The request is true when standard input has ended, which also happens if the flow's process is
   killed, and after SIGTERM and SIGINT, which a scheduler may send to ranks too.
3. After each step the ranks check together whether any of them has a request. If so, they save
   a checkpoint, report `stopped` in events.jsonl, and end with exit code 0 (`Session.run`).
   Ranks on several machines are not children of the flow, which creates the file `stop` in the
   run's folder instead. If only some machines get a signal, such as before a scheduler reclaims
   them, the ranks of the others end with another exit code, so that torchrun restarts them.
4. The flow's process exits with code 143 after SIGTERM and 130 after Ctrl-C. The same command
   resumes from the checkpoint.

A second signal, at least a second after the first, ends a rank at once without a checkpoint.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

from zeroflow.training import zero

Stop = Callable[[], bool]
"""Returns True if any rank was asked to stop. All ranks must call it together."""

_SAME_REQUEST_SECONDS = 1.0
"""Signals within this time of the first one count as the same request."""

_ORPHAN_SECONDS = 600.0
"""Time for orphaned ranks to finish their step and save."""


class Parent:
    """The process that started this rank, at the other end of standard input.

    It writes a line for each task, and standard input ends when it asks this rank to stop or dies.
    """

    def __init__(self) -> None:
        self.lost_at: float | None = None
        """Monotonic time at which standard input ended."""

        self.working = False
        """True while this rank works on a job."""

        self._lines: SimpleQueue[str | None] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def lines(self) -> Iterator[str]:
        """Yield each line, until standard input ends."""
        return iter(self._lines.get, None)

    def _read(self) -> None:
        rest = b""
        # Not sys.stdin, whose lock would be held when the interpreter exits
        while given := os.read(0, 2**16):
            *lines, rest = (rest + given).split(b"\n")
            for line in lines:
                self._lines.put(line.decode())
        self.lost_at = time.monotonic()
        self._lines.put(None)
        if not self.working:
            os._exit(0)  # the main thread may be importing
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1:
            # The main thread may wait forever for a rank that has died, and there is no parent to
            # end it. So this thread ends the rank, and allows time to save if all ranks have joined
            # the process group
            if zero.ranks() == ranks:
                time.sleep(_ORPHAN_SECONDS)
            os._exit(1)  # sys.exit would only end this thread


class StopRequest:
    """Request to stop the job of this rank. It is true after a request has arrived."""

    def __init__(self, parent: Parent | None = None, *, file: Path | None = None) -> None:
        """
        Args:
            parent: its loss is a request; None for a rank that another launcher watches.
            file: file that a flow creates to stop the ranks of several machines; None for no file.
        """
        self._signalled_at: float | None = None
        self._parent = parent
        self._file = file
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    @property
    def signalled(self) -> bool:
        """True if this process received a signal or lost its parent."""
        return self._since is not None

    @property
    def to_all(self) -> bool:
        """True if the flow has asked the ranks of all machines to stop."""
        return self._file is not None and self._file.exists()

    def __bool__(self) -> bool:
        return self.signalled or self.to_all

    @property
    def _since(self) -> float | None:
        return self._signalled_at or (self._parent.lost_at if self._parent else None)

    def _on_signal(self, number: int, frame: object) -> None:
        # A scheduler signals all processes at once, so a rank gets a signal and loses its parent at
        # the same time. This is one request. A later signal comes from a user who does not want to
        # wait for the checkpoint
        if self._since and time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        self._signalled_at = self._since or time.monotonic()


class Agreement:
    """Lets all ranks stop together if any of them has a request."""

    def __init__(self, request: StopRequest) -> None:
        self._request, self._strongest = request, 0

    def __call__(self) -> bool:
        """Return True if any rank has a request."""
        mine = 2 if self._request.to_all else int(self._request.signalled)
        self._strongest = zero.max_over_ranks(mine)
        return self._strongest > 0

    @property
    def is_for_others(self) -> bool:
        """True if only ranks on other machines were asked to stop."""
        return self._strongest == 1 and not self._request.signalled
