"""Torchrun's agent of one machine: `-m zeroflow.training.agent`, with the arguments of torchrun.

The first agent that starts on the machine of the endpoint has the store through which all agents
meet. If it dies, torchrun ends on all machines. This program then starts torchrun again, and so the
agents meet as soon as another one has a store: the agent that is restarted on that machine, or, if
several agents share the machine, one that is left.
"""

import logging
import os
import sys
import time
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

from zeroflow.run_folder import RunFolder
from zeroflow.training.hosts import AGENT, OWN_STORE
from zeroflow.training.job import finished, read_job

log = logging.getLogger(__name__)

_WAIT_SECONDS = 2.0
"""Time between two attempts to meet the other agents."""


@record
def main() -> None:
    """Run torchrun until its ranks have ended, also if it loses the other agents."""
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    os.environ[OWN_STORE] = "1"
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except (RendezvousConnectionError, RendezvousTimeoutError) as error:
        [job_file, *_] = arguments.training_script_args
        if finished(read_job(RunFolder(Path(job_file).parent))):
            return
        log.warning(
            "no connection to the other machines through %s (%s); trying again until they are "
            "there, or until this is stopped",
            arguments.rdzv_endpoint,
            error,
        )
        time.sleep(_WAIT_SECONDS)
        # A new program, because a store that is left in this one would be used again
        os.execv(sys.executable, [sys.executable, *AGENT[1:], *sys.argv[1:]])


if __name__ == "__main__":
    main()
