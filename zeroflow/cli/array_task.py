"""A run of a sweep as a task of a job array: `-m zeroflow.cli.array_task RUN.json`."""

import logging
import signal
import sys
from pathlib import Path

from zeroflow import artifacts, pipeline
from zeroflow.cli.console import fail, log_to_console, terminate
from zeroflow.settings.run_config import RunConfig
from zeroflow.tracking import loopback
from zeroflow.training import recovery
from zeroflow.training.failures import TrainingFailed

log = logging.getLogger("zeroflow")


def main() -> int:
    """Run the pipeline without Prefect, which has no server that all nodes reach.

    Returns:
        Exit code: 0, or 1 for a failure. SIGTERM stops the run with code 143.
    """
    loopback.bypass_proxies()
    log_to_console(verbose=False)
    signal.signal(signal.SIGTERM, terminate)
    asked = RunConfig.model_validate(artifacts.read_json(Path(sys.argv[1])))
    for _ in range(recovery.MOST_RETRIES):
        try:
            pipeline.pretrain(asked)
            return 0
        except TrainingFailed as error:
            if not error.will_retry:
                return fail(error, verbose=False)
        except Exception as error:
            return fail(error, verbose=True)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
