"""Names of our objects on Prefect's server."""

import shutil
import sys

PRETRAIN = "pretrain"
SWEEP = "sweep"
PROVE_RESUME = "prove-resume"
ZERO_LAB = "zero-lab"
"""Flows."""

FLOW_NAMES = (PRETRAIN, SWEEP, PROVE_RESUME, ZERO_LAB)
"""Names of all flows."""

SWEEP_DEPLOYMENT = "sizes"
"""Deployment of sweeps that are started on the command line."""

WORK_POOL = "zeroflow"

GPU_LIMIT = "zeroflow-gpu"
"""Limit of concurrent GPU jobs over all runs of the server."""

AUTOMATION = "zeroflow: a flow run whose process is gone has crashed"

FROM_A_COMMAND = "command"
"""Tag of flow runs that a command executes itself, instead of a worker."""


def zeroflow_command() -> list[str]:
    """Return the beginning of a command of this package for a shell."""
    return ["zeroflow"] if shutil.which("zeroflow") else [sys.executable, "-m", "zeroflow.cli"]
