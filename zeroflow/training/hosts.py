"""Ranks on several machines, which torchrun starts: the command of each, and how to follow them.

Torch elastic connects the machines, restarts all ranks if one fails, and ends them if too few
machines are left: https://docs.pytorch.org/docs/stable/elastic/run.html. `agent` also restarts them
after the loss of the machine through which all machines are connected. The flow follows the run's
events, and creates a file to ask the ranks to stop. It may therefore run on any machine that shares
the run's folder. On each machine, `host_watch` ends ranks that would wait for others forever.
"""

import logging
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from zeroflow.device import DeviceKind
from zeroflow.run_folder import RunFolder
from zeroflow.training import ownership
from zeroflow.training.events import Done, Event, Failed, Started, Stopped
from zeroflow.training.failures import FailureReason, TrainingFailed, TrainingStopped
from zeroflow.training.following import Progress
from zeroflow.training.pulse import Pulse

log = logging.getLogger(__name__)

PORT = 29400
"""Port on the first machine to which the others connect; torchrun's default."""

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of torchrun; 1 gives the ranks a new store at every start. In torchrun's own
store, addresses of dead ranks would survive a restart."""

AGENT = ("python", "-m", "zeroflow.training.agent")
"""Command that starts torchrun, and starts it again if it has lost the other machines."""

_MOST_RESTARTS = 20
"""Maximum number of restarts by torchrun. Each resumes from the newest checkpoint."""

_STOP_SECONDS = 120.0
"""Time for the ranks to finish their step and save."""

_REJOIN_SECONDS = 90.0
"""Time to wait for the ranks to start again after they saved and ended because a machine joined."""

_POLL_SECONDS = 0.2


class Gang(NamedTuple):
    """The ranks of several machines."""

    module: str
    """Module of the ranks' program."""

    job_file: Path
    """The job of the ranks, in the run's folder."""

    nodes: int
    """Number of machines."""

    min_nodes: int
    """Minimum number of machines with which training continues if others fail."""

    ranks: int
    """Number of ranks on all machines."""

    device: DeviceKind
    """cuda if each rank needs a GPU."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.job_file.parent)

    @property
    def ranks_of_each(self) -> int:
        """Number of ranks on one machine."""
        return self.ranks // self.nodes

    def command(self, endpoint: str, torchrun: Sequence[str] = AGENT) -> list[str]:
        """Return the command that starts the ranks of one machine, the same on each.

        Args:
            endpoint: name or address of the machine to which all connect, and its port.
            torchrun: command that starts torchrun. The default waits for a lost machine of the
                endpoint to return.
        """
        least = "" if self.min_nodes == self.nodes else f"{self.min_nodes}:"
        return [
            *torchrun,
            f"--nnodes={least}{self.nodes}",
            f"--nproc-per-node={self.ranks_of_each}",
            f"--max-restarts={_MOST_RESTARTS}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            f"--rdzv-id={self.folder.name}",
            "-m",
            self.module,
            str(self.job_file.absolute()),
        ]


Ended = Callable[[], bool]
"""Returns True if the ranks have reported their end."""

Held = Callable[[], bool] | None
"""Returns True as long as the scheduler has the machines or waits for them. None if there is no
scheduler."""

Launcher = Callable[[Gang, Ended], AbstractContextManager[Held]]
"""Context manager that provides the machines of a gang. If its block is left early, it ends the
ranks."""


@contextmanager
def by_hand(gang: Gang, ended: Ended) -> Iterator[Held]:
    """Log the command for each machine; ask the ranks to stop if the block is left early."""
    log.info(
        "waiting for the ranks of %d machines. Run on each of them, in an environment with "
        "zeroflow:\n  %s",
        gang.nodes,
        shlex.join(gang.command(f"{socket.getfqdn()}:{PORT}")),
    )
    with asked_to_stop(gang.folder, ended):
        yield None


@contextmanager
def asked_to_stop(folder: RunFolder, ended: Ended) -> Iterator[None]:
    """Ask the ranks to save and stop if the block is left early, and wait until they have.

    After a failure the ranks end at once, and the ranks that torchrun starts then wait for the next
    job.
    """
    folder.stop.unlink(missing_ok=True)
    folder.pause.unlink(missing_ok=True)
    try:
        yield
    except TrainingFailed:
        folder.pause.touch()
        raise
    except BaseException:
        if not ended():
            log.info("asking the ranks of all machines to save a checkpoint and stop")
            folder.stop.touch()
            until = time.monotonic() + _STOP_SECONDS
            while not ended() and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
        raise
    finally:
        folder.stop.unlink(missing_ok=True)


def follow(
    gang: Gang,
    launcher: Launcher,
    on_event: Callable[[Event | Pulse], None],
    on_restart: Callable[[TrainingFailed], None],
    *,
    hang_seconds: int,
) -> None:
    """Follow the ranks of several machines to their end, through restarts.

    Args:
        on_event: called with every new event and every new pulse.
        on_restart: called with every failure after which torchrun restarts the ranks with the same
            job; may raise it.
        hang_seconds: time without a heartbeat after which ranks are ended.

    Raises:
        RunIsBusy: another process follows the ranks of this run.
        TrainingFailed: a rank failed, and would fail again with the same job.
        TrainingStopped: the ranks were stopped from outside.
    """
    busy = f"another process is working on run {gang.folder.name}"
    with ownership.exclusive(gang.folder.launch_lock, busy):
        attempts = _Attempts(on_event)
        progress = Progress(gang.folder, attempts)

        def ended() -> bool:
            progress.follow()
            return isinstance(progress.last, Done | Stopped)

        with launcher(gang, ended) as held:
            while True:
                # Before the events are read: the last events precede the end of the machines
                is_held = held() if held else None
                progress.follow()
                attempts.report(on_restart)
                if isinstance(progress.last, Done):
                    return
                if isinstance(progress.last, Stopped):
                    if not (attempts.may_start_again() if is_held is None else is_held):
                        raise TrainingStopped(progress.last.message)
                elif is_held is False:
                    raise TrainingFailed(
                        f"the machines of run {gang.folder.name} are gone", "killed"
                    )
                elif attempts.running and progress.seconds_since_last() > hang_seconds:
                    raise TrainingFailed(f"the ranks made no progress for {hang_seconds} s", "hang")
                time.sleep(_POLL_SECONDS)


class _Attempts:
    """Follows the attempts of the ranks. An attempt ends with a failure or with the training."""

    def __init__(self, on_event: Callable[[Event | Pulse], None]) -> None:
        self._on_event = on_event
        self._failures: list[TrainingFailed] = []
        self._begun = False
        self._stopped = 0.0
        self.running = False

    def __call__(self, event: Event | Pulse) -> None:
        self._on_event(event)
        match event:
            case Pulse() | Done():
                return
            case Started() if self.running:
                self._note("the ranks ended without an error message, as if killed", "killed")
            case Failed() if event.reason in ("out of memory", "diverged") or not self._begun:
                self._note(event.message, event.reason, event.step)
            case Failed() if self.running:  # the other ranks report the consequences
                self._note(event.message, "killed")
            case Stopped():
                self._stopped = time.monotonic()
                log.info("the ranks have saved and ended; waiting in case torchrun restarts them")
        self.running = not isinstance(event, Failed | Stopped)
        self._begun |= self.running

    def report(self, on_restart: Callable[[TrainingFailed], None]) -> None:
        """Report new failures; raise the first that a restart cannot fix."""
        failures, self._failures = self._failures, []
        for failure in failures:
            if failure.reason != "killed":
                raise failure
            on_restart(failure)

    def may_start_again(self) -> bool:
        """Return True if torchrun may have stopped the ranks because a machine joins."""
        return time.monotonic() - self._stopped < _REJOIN_SECONDS

    def _note(self, message: str, reason: FailureReason, step: int | None = None) -> None:
        self._failures.append(TrainingFailed(message, reason, step))
