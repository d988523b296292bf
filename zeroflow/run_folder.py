"""Names of the files of runs and sweeps, and of the cache's folders, in one place.

Layout: `<cache>/runs/<name>/` holds the files of a run, `<cache>/sweeps/<name>/` those of a
sweep. The code that writes a file documents its type.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from zeroflow.config import NAME, NAME_IN_WORDS

DEFAULT_CACHE = Path("data_cache")


class _Named:
    """Path of a file in a folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "_Folder", owner: type) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class _Folder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


class TrackedFolder(_Folder):
    """The folder of a run or a sweep, each of which is a run in MLflow."""

    mlflow = _Named("mlflow.json")
    """Ids of the run in MLflow."""


class RunFolder(TrackedFolder):
    """The folder of a run."""

    wandb = _Named("wandb.json")
    """Id of the run in Weights & Biases."""

    # Written before anything is built
    settings = _Named("run.json")
    asked = _Named("asked.json")
    """Requested settings whose settled value differs, such as a branch or a fallback."""

    plan = _Named("plan.json")

    # Written by the stages
    data_page = _Named("data.md")
    lengths_plot = _Named("lengths.png")
    model = _Named("model.json")
    job = _Named("job.json")
    preflight = _Named("preflight.json")
    preflight_job = _Named("preflight-job.json")
    preflight_checkpoint = _Named("preflight-checkpoint")
    stop = _Named("stop")
    """Exists while the ranks of several machines are asked to stop."""

    pause = _Named("pause")
    """Exists while the ranks of several machines wait for a new job after a failure."""

    training = _Named("training.json")
    """Result of training that reached its last step."""

    overfit = _Named("overfit.json")
    overfit_job = _Named("overfit-job.json")
    overfit_plot = _Named("overfit.png")

    # Written while ranks are running
    metrics = _Named("metrics.jsonl")
    """One line for each logged step and each validation."""

    events = _Named("events.jsonl")
    """History of the run's processes; append-only."""

    ledger = _Named("ledger.jsonl")
    """One line for each recovery from a failure."""

    goodput = _Named("goodput.jsonl")
    alive = _Named("alive")
    """Newest pulse of rank 0; rewritten whenever rank 0 makes progress."""

    slurm_script = _Named("slurm.sh")
    """The script for sbatch."""

    slurm_job = _Named("slurm.json")
    """Number of the Slurm job."""

    kubernetes = _Named("kubernetes.json")
    """Manifest for kubectl."""

    beats = _Named("beats")
    """Signs of life of the machines, one file for each."""

    logs = _Named("logs")
    """Output of the ranks of several machines, a file for each."""

    checkpoints = _Named("checkpoints")

    # The report
    report = _Named("report.json")
    report_page = _Named("report.md")
    loss_plot = _Named("loss.png")
    time_plot = _Named("time.png")

    evaluation = _Named("evaluation.json")
    """Scores of checkpoints on texts and tasks."""

    registering = _Named("registering")
    """Files of a model while it is sent to MLflow."""

    # The proof that resume is exact
    proof = _Named("proof.json")
    proof_page = _Named("proof.md")
    proof_plot = _Named("proof.png")

    # The ZeRO laboratory
    zero_lab = _Named("zero_lab.json")
    zero_lab_page = _Named("zero_lab.md")
    zero_memory_plot = _Named("zero-memory.png")
    zero_traffic_plot = _Named("zero-traffic.png")
    zero_timeline_plot = _Named("zero-timeline.png")
    zero_losses_plot = _Named("zero-losses.png")
    zero_bandwidth_plot = _Named("zero-bandwidth.png")

    # Locks, for `artifacts.exclusive`
    owner_lock = _Named("owner")
    """Locked by the command that works on the run, from its first file to its last."""

    launch_lock = _Named("launch")
    """Locked while ranks are launched and watched."""

    proof_lock = _Named("proof")

    def lab_job(self, ranks: int) -> Path:
        """Return the job of the ranks that the laboratory measures."""
        return self.path / f"zero-lab-{ranks}.json"

    def lab_measurements(self, ranks: int) -> Path:
        """Return the file for what these ranks measured."""
        return self.path / f"zero-lab-{ranks}-measured.json"

    def worker_lock(self, rank: int) -> Path:
        """Return the lock of a rank, which may outlive the command that launched it."""
        return self.path / (f"worker-{rank}" if rank else "worker")

    def inner(self, name: str) -> Self:
        """Return the folder of a run inside this one, such as one of the two runs of a proof."""
        return type(self)(self.path / name)

    @property
    def cache(self) -> "Cache":
        return Cache(self.path.parents[1])


class SweepFolder(TrackedFolder):
    """The folder of a sweep."""

    settings = _Named("sweep.json")
    tracking = _Named("group.json")
    """Settings of the sweep's own run in MLflow."""

    comparison = _Named("comparison.json")
    comparison_page = _Named("comparison.md")

    @property
    def array(self) -> "ArrayFolder":
        return ArrayFolder(self.path / "array")

    def loss_plot(self, axis: str) -> Path:
        """Return the plot of the losses of all runs against `axis`."""
        return self.path / f"loss-by-{axis}.png"


class ArrayFolder(_Folder):
    """The folder of the job array whose tasks are the runs of a sweep."""

    script = _Named("slurm.sh")
    """The script for sbatch."""

    slurm_job = _Named("slurm.json")
    """Number of the job."""

    stop = _Named("stop")
    """Exists after the sweep's command has asked the runs to stop."""

    def settings(self, run: str) -> Path:
        """Return the file with the settings of a run."""
        return self.path / f"{run}.json"

    def log(self, run: str) -> Path:
        """Return the file with the output of a run."""
        return self.path / f"{run}.log"


class Cache(_Folder):
    """The folder for all output."""

    tokenizers = _Named("tokenizers")
    digests = _Named("digests")
    """Digests of local files, so that a start does not read unchanged files again."""

    models = _Named("models")
    """Weights of trained models that runs start from."""

    shards = _Named("shards")
    runs = _Named("runs")
    sweeps = _Named("sweeps")
    plans = _Named("plans.jsonl")
    """Predicted and measured figures of earlier runs."""

    compiled = _Named("compile")
    """Code that torch.compile and Triton have compiled on this machine."""

    kernels = _Named("kernels")
    """Kernels that were the fastest on this machine, by shape."""

    mlflow = _Named("mlflow")
    """MLflow's store, used unless MLFLOW_TRACKING_URI names another."""

    logs = _Named("ui")
    """Logs of the servers and the worker that `zeroflow ui` starts."""

    def run(self, name: str) -> RunFolder:
        """
        Raises:
            ValueError: `name` is not a name, but for example a path.
        """
        _require_name(name, "run")
        return RunFolder(self.runs / name)

    def sweep(self, name: str) -> SweepFolder:
        """
        Raises:
            ValueError: as `run` does.
        """
        _require_name(name, "sweep")
        return SweepFolder(self.sweeps / name)

    def existing_runs(self) -> Iterator[RunFolder]:
        """Return all runs, sorted by name; a run that has just begun may have no files yet."""
        return (RunFolder(path) for path in sorted(self.runs.glob("*")) if path.is_dir())


def _require_name(name: str, kind: str) -> None:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{name!r} cannot be the name of a {kind}: {NAME_IN_WORDS}")
