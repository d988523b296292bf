"""Names that Prefect's server knows."""

PRETRAIN = "pretrain"
SWEEP = "sweep"
PROVE_RESUME = "prove-resume"
"""Flows."""

SWEEP_DEPLOYMENT = "sizes"
"""Deployment that a sweep of the command line is a run of."""

WORK_POOL = "zeroflow"

GPU_LIMIT = "zeroflow-gpu"
"""Concurrency limit: jobs on GPUs that run at once, over all runs that the server knows."""

AUTOMATION = "zeroflow: a flow run whose process is gone has crashed"
