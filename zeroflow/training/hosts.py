"""Ranks on several machines, which torchrun starts: the command of each, and how to follow them.

Torch elastic gathers the machines, restarts all ranks if one fails, and ends them if too few
machines are left: https://docs.pytorch.org/docs/stable/elastic/run.html. The flow neither starts
nor ends them. It follows the run's events and asks the ranks to stop by a file, so it may run on
any machine that shares the run's folder.
"""

import logging
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zeroflow.run_folder import RunFolder

log = logging.getLogger(__name__)

PORT = 29400
"""Port of the first machine at which the machines meet; torchrun's default."""

_MOST_RESTARTS = 20
"""Maximum number of restarts by torchrun. Each resumes from the newest checkpoint."""

_STOP_SECONDS = 120.0
"""Time for the ranks to finish their step and save."""


def command(module: str, job_file: Path, *, nodes: int, ranks: int) -> str:
    """Return the shell command that starts the ranks of one machine, the same on each.

    Args:
        nodes: number of machines.
        ranks: number of ranks on all of them.
    """
    words = [
        # Torchrun's own store outlives a restart, and ranks would find addresses of dead ones in it
        "env",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        "torchrun",
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks // nodes}",
        f"--max-restarts={_MOST_RESTARTS}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={socket.getfqdn()}:{PORT}",
        f"--rdzv-id={job_file.parent.name}",
        "-m",
        module,
        str(job_file.absolute()),
    ]
    return shlex.join(words)


@contextmanager
def announced(
    module: str, job_file: Path, *, nodes: int, ranks: int, ended: Callable[[], bool]
) -> Iterator[None]:
    """Log the command of each machine, and ask the ranks to stop if the block is left early.

    Args:
        ended: returns True if the ranks have reported that they ended.
    """
    stop = RunFolder(job_file.parent).stop
    stop.unlink(missing_ok=True)
    log.info(
        "waiting for the ranks of %d machines. Run on each of them, in an environment with "
        "zeroflow:\n  %s",
        nodes,
        command(module, job_file, nodes=nodes, ranks=ranks),
    )
    try:
        yield
    except BaseException:
        if not ended():
            log.info("asking the ranks of all machines to save a checkpoint and stop")
            stop.touch()
            until = time.monotonic() + _STOP_SECONDS
            while not ended() and time.monotonic() < until:
                time.sleep(0.2)
        raise
    finally:
        stop.unlink(missing_ok=True)
