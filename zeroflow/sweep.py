"""Several runs that differ in size, seed, learning rate or stage of ZeRO, and their comparison."""

import logging
from itertools import product
from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from zeroflow import artifacts, comparison, pictures, settling, tracking
from zeroflow.config import Config
from zeroflow.model.sizes import SizeName
from zeroflow.planning import Stage
from zeroflow.run import RunConfig
from zeroflow.settling import RUN_FILE

log = logging.getLogger(__name__)

COMPARISON = "comparison.md"
_FIGURES = "comparison.json"
_SWEEP_FILE = "sweep.json"


class SweepConfig(Config):
    """What a sweep varies; every combination is a run."""

    sweep_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    """A sweep of the same name goes on where it stopped, and can be added to. Default: made from
    the settings."""

    sizes: tuple[SizeName, ...] = ()
    """Sizes to train. Default: the one of the run."""

    seeds: tuple[NonNegativeInt, ...] = ()
    """Seeds to train each with. Default: the one of the run."""

    learning_rates: tuple[PositiveFloat, ...] = ()
    """Peak learning rates to train each at. Default: the one of the run, or of the size."""

    zero_stages: tuple[Stage, ...] = ()
    """Stages of ZeRO to train each at, on several GPUs. Default: the one of the run."""

    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _varies_what_the_run_leaves_open(self) -> Self:
        run = self.run
        fixed = {
            "run_name": run.run_name is not None,
            "sweep": run.sweep is not None,
            "size": bool(self.sizes) and (run.model.size or run.model.hidden_size) is not None,
            "learning_rate": bool(self.learning_rates) and run.training.learning_rate is not None,
            "zero_stage": bool(self.zero_stages) and run.training.zero_stage is not None,
        }
        for name, given in fixed.items():
            if given:
                flag = name.replace("_", "-")
                raise ValueError(f"a sweep sets --{flag} of its runs itself: drop it")
        if self.zero_stages and (run.training.gpus or 1) == 1:
            raise ValueError(
                "--zero-stages are of several GPUs: add --gpus, such as --gpus 2; with --device "
                "cpu, processes stand for them"
            )
        for name in ("sizes", "seeds", "learning_rates", "zero_stages"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names the same twice: {', '.join(map(str, values))}")
        return self

    @property
    def name(self) -> str:
        # without defaults, or a new setting would give every sweep a new name
        given = self.model_dump(
            mode="json", exclude={"sweep_name": True, "run": {"cache_dir"}}, exclude_defaults=True
        )
        return self.sweep_name or f"sweep-{artifacts.fingerprint(given)[:6]}"

    @property
    def anywhere(self) -> Self:
        """With paths that mean the same from every working directory, and its name."""
        return self.model_copy(update={"sweep_name": self.name, "run": self.run.anywhere})

    @property
    def folder(self) -> Path:
        return folder(self.run.cache_dir, self.name)


def folder(cache: Path, name: str) -> Path:
    """Of sweep `name`."""
    return cache / "sweeps" / name


def cells(sweep: SweepConfig) -> list[RunConfig]:
    """The runs of a sweep, in the order of its sizes, named after what they are."""
    found = []
    axes: tuple[tuple[Any, ...], ...]
    axes = (sweep.sizes, sweep.seeds, sweep.learning_rates, sweep.zero_stages)
    for size, seed, rate, stage in product(*(axis or (None,) for axis in axes)):
        # What was given and nothing else: a default is settled for each run
        given = sweep.run.model_dump(exclude_unset=True)
        name = [sweep.name, str(size or sweep.run.model.name)]
        if size is not None:
            given["model"] = {"size": size}
        if seed is not None:
            given["seed"] = seed
            name.append(f"seed{seed}")
        if rate is not None:
            given["training"] = given.get("training", {}) | {"learning_rate": rate}
            name.append(f"lr{rate:g}".replace("+", ""))
        if stage is not None:
            given["training"] = given.get("training", {}) | {"zero_stage": stage}
            name.append(f"zero{stage}")
        given |= {"sweep": sweep.name, "run_name": "-".join(name)}
        found.append(RunConfig.model_validate(given))
    return found


def finished(cell: RunConfig) -> bool:
    """Whether a run has completed, as its report says."""
    return comparison.outcome(cell.cache_dir, str(cell.run_name)) is not None


def require_as_started(sweep: SweepConfig) -> None:
    """
    Raises:
        ValueError: a run of the sweep was trained with other settings before.
    """
    for cell in cells(sweep):
        if different := settling.started_otherwise(cell):
            raise ValueError(
                f"run {cell.run_name} of sweep {sweep.name} was started with {different}: use "
                "another --sweep-name, or the former setting"
            )


def open_group(sweep: SweepConfig) -> None:
    """Record the sweep, and open the MLflow run that holds its runs together."""
    uri, local = tracking.location(sweep.run.cache_dir)
    artifacts.write_json(sweep.folder / _SWEEP_FILE, sweep.model_dump(mode="json"))
    axes = ("sizes", "seeds", "learning_rates", "zero_stages")
    varied = {name: getattr(sweep, name) for name in axes}
    config = tracking.TrackingConfig(
        uri=uri,
        folder=local,
        run_name=sweep.name,
        tags={"sweep": sweep.name, tracking.DESCRIPTION: f"Sweep of {len(cells(sweep))} runs"},
        params={name: " ".join(map(str, values)) for name, values in varied.items()},
        dataset=None,
    )
    tracking.open_group(config, sweep.folder)


def compare(sweep: SweepConfig, *, failed: list[str]) -> Path:
    """Write the comparison of the sweep's finished runs, also to MLflow.

    Those that an earlier command has trained are among them.

    Returns:
        the path of comparison.md

    Raises:
        ValueError: no run has finished.
    """
    cache, where = sweep.run.cache_dir, sweep.folder
    outcomes = [one for name in _members(sweep) if (one := comparison.outcome(cache, name))]
    if not outcomes:
        raise ValueError(f"no run of sweep {sweep.name} has finished: {', '.join(failed)}")
    found = comparison.compare(outcomes)
    drawn = pictures.losses_compared(found, where)
    page = where / COMPARISON
    text = comparison.markdown(
        sweep.name, found, pictures=[path.name for path in drawn], failed=failed
    )
    page.write_text(text, encoding="utf-8")
    artifacts.write_json(where / _FIGURES, comparison.figures(found))
    law = {"sweep/exponent": found.law.b} if found.law else {}
    best = min(one.val_loss for one in outcomes)
    tracking.close_group(
        where, [page, where / _FIGURES, *drawn], {"sweep/val_best": best} | law, failed=bool(failed)
    )
    return page


def _members(sweep: SweepConfig) -> list[str]:
    """Names of all runs that were ever asked for as ones of the sweep."""
    asked = [str(cell.run_name) for cell in cells(sweep)]
    there = sorted((sweep.run.cache_dir / "runs").glob(f"*/{RUN_FILE}"))
    earlier = [file.parent.name for file in there if _sweep_of(file) == sweep.name]
    return list(dict.fromkeys(asked + earlier))


def _sweep_of(run_file: Path) -> Any:
    try:
        return artifacts.read_json(run_file)["sweep"]
    except (OSError, ValueError, LookupError):  # of another version, or damaged
        return None
