"""Settings of a sweep over sizes, seeds, learning rates or ZeRO stages."""

from itertools import product
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from zeroflow import artifacts
from zeroflow.config import NAME, Config, FinitePositive, WholeNonNegative, flag
from zeroflow.model.sizes import SizeName
from zeroflow.run_folder import Cache, SweepFolder
from zeroflow.settings.refusals import refuse_one_rank
from zeroflow.settings.run_config import RunConfig
from zeroflow.training.zero import Stage


class SweepConfig(Config):
    """Axes of a sweep. Every combination of values is one run."""

    sweep_name: str | None = Field(None, pattern=NAME, max_length=60)
    """Name of the sweep. An existing sweep of this name is resumed, and values can be added to it.
    Default: made from the settings."""

    sizes: tuple[SizeName, ...] = ()
    """Model sizes. Default: the size of the run."""

    seeds: tuple[WholeNonNegative, ...] = ()
    """Seeds. Default: the seed of the run."""

    learning_rates: tuple[FinitePositive, ...] = ()
    """Peak learning rates. Default: the learning rate of the run, or that of each size."""

    zero_stages: tuple[Stage, ...] = ()
    """ZeRO stages, for several GPUs. Default: the stage of the run."""

    run: RunConfig = RunConfig()

    no_flags: ClassVar[tuple[str, ...]] = ("run.run_name", "run.sweep")
    """Settings that a sweep sets itself, for each run."""

    @model_validator(mode="after")
    def _varies_what_the_run_leaves_open(self) -> Self:
        run = self.run
        fixed = {
            "run_name": run.run_name is not None,
            "sweep": run.sweep is not None,
            "seed": bool(self.seeds) and run.seed != RunConfig.model_fields["seed"].default,
            "learning_rate": bool(self.learning_rates) and run.training.learning_rate is not None,
            "zero_stage": bool(self.zero_stages) and run.training.zero_stage is not None,
        }
        for name, given in fixed.items():
            if given:
                raise ValueError(f"a sweep sets {flag(name)} of its runs: drop it")
        if self.sizes and run.model.settled == run.model:
            shape = next(name for name, given in run.model if given is not None)
            raise ValueError(
                f"--sizes and {flag(shape)} both set the shape of the models: drop one of them"
            )
        if self.zero_stages:
            refuse_one_rank(run, "--zero-stages")
        for name in ("sizes", "seeds", "learning_rates", "zero_stages"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                listed = ", ".join(map(str, values))
                raise ValueError(f"{flag(name)} lists a value twice: {listed}")
        return self

    @property
    def name(self) -> str:
        # Defaults are left out, so that adding a setting does not rename existing sweeps
        run = self.run.model_copy(update={"register_": None})
        given = self.model_copy(update={"run": run}).model_dump(
            mode="json",
            exclude={"sweep_name": True, "run": {"cache_dir", "log_to"}},
            exclude_defaults=True,
        )
        return self.sweep_name or f"sweep-{artifacts.fingerprint(given)[:6]}"

    @property
    def in_array(self) -> bool:
        """True if the runs are tasks of a job array of Slurm, each on one machine."""
        return self.run.hosts.launcher == "slurm" and self.run.training.nodes == 1

    @property
    def anywhere(self) -> Self:
        """Return the same settings with the sweep's name and absolute paths."""
        return self.model_copy(update={"sweep_name": self.name, "run": self.run.anywhere})

    @property
    def folder(self) -> SweepFolder:
        return Cache(self.run.cache_dir).sweep(self.name)


def _digits(rate: float) -> str:
    """Return a learning rate as text that no other rate has."""
    short = f"{rate:g}"
    return short if float(short) == rate else repr(rate)


def cells(sweep: SweepConfig) -> list[RunConfig]:
    """Return the settings of the runs of a sweep, ordered by size; names contain the values."""
    found = []
    axes: tuple[tuple[Any, ...], ...]
    axes = (sweep.sizes, sweep.seeds, sweep.learning_rates, sweep.zero_stages)
    for size, seed, rate, stage in product(*(axis or (None,) for axis in axes)):
        # Only the given settings, because defaults are settled for each run
        given = sweep.run.model_dump(exclude_unset=True)
        name = [sweep.name, str(size or sweep.run.model.name)]
        if size is not None:
            given["model"] = {"size": size}
        if seed is not None:
            given["seed"] = seed
            name.append(f"seed{seed}")
        if rate is not None:
            given["training"] = given.get("training", {}) | {"learning_rate": rate}
            name.append(f"lr{_digits(float(rate))}".replace("+", ""))
        if stage is not None:
            given["training"] = given.get("training", {}) | {"zero_stage": stage}
            if stage == 0:  # it shards nothing, so it has no groups
                given["training"].pop("shard_group", None)
            if stage != 3:  # it gathers no weights for the backward pass
                given["training"].pop("reshard_group", None)
            name.append(f"zero{stage}")
        if sweep.in_array:  # the array starts the run
            for setting in ("launcher", "sbatch_options"):
                given["hosts"].pop(setting, None)
        given |= {"sweep": sweep.name, "run_name": "-".join(name)}
        found.append(RunConfig.model_validate(given))
    return found
