"""RankProgram of ranks that run every ZeRO stage in one start; `test_zero` reads their results.

With groups, they run the stage of the job; `test_shard_groups` reads their results.
"""

import math
import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MODEL, WORKLOAD, ArrayRows, RandomBatches, with_workload
from torch.distributed.distributed_c10d import _world
from torch.utils._python_dispatch import TorchDispatchMode

from zeroflow import artifacts
from zeroflow.data.batches import MicroBatch, to_micro_batch
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.training import checkpoint, sampling, zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.events import EVENTS, Done
from zeroflow.training.job import RankJob
from zeroflow.training.launch import launch
from zeroflow.training.loop import train, train_step
from zeroflow.training.rank_program import RankProgram, make_deterministic
from zeroflow.training.retention import Retention
from zeroflow.training.sampling import SamplingConfig
from zeroflow.training.saver import Saver
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.stopping import Stop
from zeroflow.training.validation import validation_loss

STAGES = (0, 1, 2, 3)
OFFLOADED = "2 offloaded"
"""Stage 2 with the state of the optimiser in host memory, with all ranks in one group."""

STEPS, SAVED = 5, 3
TOKENIZER = "0123456789ab"
END = 0


class Validation(ArrayRows):
    end_of_text = END


ROWS = np.random.default_rng(0).integers(1, MODEL.vocab_size, (5, 13)).view(Validation)
"""Number of rows with which, at two rows per micro-batch, one of two ranks has three and the
other two."""


class Shares:
    """The rows of a step, each a micro-batch, divided among the ranks.

    The last half is mostly padding, so that ranks have different numbers of targets.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def micro_batches(self, step: int) -> list[MicroBatch]:
        [whole] = RandomBatches(rows=self._rows).micro_batches(step)
        rows = torch.cat((whole.inputs, whole.targets[:, -1:]), dim=1).clamp(min=1).numpy()
        rows[self._rows // 2 :, 4:] = END
        mine = np.split(rows, zero.ranks())[zero.rank()]
        return [to_micro_batch(row[None], end_of_text=END) for row in mine]


def trained(state: TrainState, config: TrainingConfig, steps: int) -> list[dict[str, float]]:
    """Return the metrics of the next `steps` steps."""
    return [
        {
            "loss": metrics.loss.item(),
            "grad_norm": metrics.grad_norm.item(),
            "update_ratio": config.workload.optimizer.update_ratio(state.optimizer).item(),
        }
        for metrics in islice(train(state, Shares(config.workload.batch_rows), config), steps)
    ]


def looked_at(state: TrainState) -> dict[str, Any]:
    """Return results that do not train: validation and samples between steps."""
    tokenizer = Tokenizer(
        path=None, name="ids", vocab_size=MODEL.vocab_size, end_of_text=END, fingerprint=TOKENIZER
    )
    return {
        "validation": validation_loss(state.model, ROWS, np.arange(len(ROWS)), WORKLOAD).mean,
        "sample": sampling.generate_ids(
            # with different seeds, all ranks must use the choice of rank 0
            *(state.model, tokenizer, SamplingConfig(tokens=6, seed=zero.rank())),
            context=12,
            agree=lambda token: zero.on_rank0(lambda: token),
        ),
    }


def saved(state: TrainState, folder: Path) -> None:
    saver = Saver(folder, Retention(keep=1), tokenizer=TOKENIZER)
    saver.save(state)
    zero.on_rank0(saver.wait)


def alone(config: TrainingConfig, folder: Path) -> dict[str, Any]:
    """Train in this process, save in the middle, and return the figures."""
    state = new_state(config)
    found: dict[str, Any] = {"before": trained(state, config, SAVED)}
    found |= looked_at(state)
    saved(state, folder / "one")
    return found | {"continued": trained(state, config, STEPS - SAVED)}


def loaded(config: TrainingConfig, folder: Path) -> TrainState:
    state = new_state(config.replace(seed=9))
    newest = zero.on_rank0(lambda: checkpoint.latest(folder))
    assert newest
    checkpoint.load(state, newest, tokenizer=TOKENIZER)
    return state


def at_stage(config: TrainingConfig, folder: Path, of_one: Path) -> dict[str, Any]:
    """Return figures of training, of its resume, and of a resume from one rank's checkpoint."""
    state = new_state(config)
    found: dict[str, Any] = {"before": trained(state, config, SAVED)}
    if not config.workload.shard_group:  # with groups, weights are gathered in the same way
        found |= looked_at(state)
    saved(state, folder)
    found["continued"] = trained(state, config, STEPS - SAVED)
    found["resumed"] = trained(loaded(config, folder), config, STEPS - SAVED)
    found["from one process"] = trained(loaded(config, of_one), config, STEPS - SAVED)
    parameters = [p for _, p in zero.named_parameters(state.model)]
    found["parameters"] = sum(p.numel() for p in parameters)
    found["kept"] = sum(zero.local_shard(p).numel() for p in parameters)
    moments = (state.optimizer.state[p]["exp_avg"] for p in parameters)
    found["moments kept"] = sum(zero.local_shard(moment).numel() for moment in moments)
    found["timeouts"] = timeouts()
    found["communicated"] = communicated(state, config)
    found["skipped"] = skipping(state, config)
    return found


def timeouts() -> list[float]:
    """Return the timeout of every process group of this rank, in seconds."""
    backends = (group._get_backend(torch.device("cpu")) for group in _world.pg_map)
    return [backend.options._timeout.total_seconds() for backend in backends]


def communicated(state: TrainState, config: TrainingConfig) -> dict[str, int]:
    """Return how often a step gathers weights and scatters gradients."""
    calls: Counter[str] = Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), more=None):  # type: ignore[no-untyped-def]
            calls[function.name()] += 1
            return function(*given, **more or {})

    with Counted():
        train_step(state, Shares(config.workload.batch_rows).micro_batches(0), config)
    return {
        "gathered": calls["c10d::_allgather_base_"],
        "scattered": calls["c10d::_reduce_scatter_base_"],
        "summed": calls["c10d::allreduce_"],
    }


def resharded(config: TrainingConfig, group: int | None) -> dict[str, Any]:
    """Return figures of training at stage 3 over all ranks, with and without a reshard group."""
    at_stage_3 = {"zero_stage": 3, "shard_group": None, "reshard_group": group}
    config = with_workload(config, **at_stage_3)
    state = new_state(config)
    found: dict[str, Any] = {"before": trained(state, config, SAVED)}
    found |= looked_at(state)
    found["continued"] = trained(state, config, STEPS - SAVED)
    return found | {"timeouts": timeouts(), "over": gathered_over(state, config)}


def gathered_over(state: TrainState, config: TrainingConfig) -> dict[str, int]:
    """Return how often a step gathers weights, by the number of ranks that exchange them."""
    calls: Counter[str] = Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), more=None):  # type: ignore[no-untyped-def]
            if function.name() == "c10d::_allgather_base_":
                whole, shard = given[:2]
                calls[str(whole.numel() // shard.numel())] += 1
            return function(*given, **more or {})

    with Counted():
        train_step(state, Shares(config.workload.batch_rows).micro_batches(0), config)
    return dict(calls)


def skipping(state: TrainState, config: TrainingConfig) -> list[Any]:
    """Run a step with a NaN loss on the last rank; return whether any weight has changed."""
    parameters = [p for _, p in zero.named_parameters(state.model)]
    before = [zero.local_shard(p).clone() for p in parameters]
    if zero.rank() == zero.ranks() - 1:
        config = config.model_copy(update={"z_loss": math.nan})
    shares = Shares(config.workload.batch_rows)
    loss = train_step(state, shares.micro_batches(0), config).loss.item()
    after = [zero.local_shard(p) for p in parameters]
    changed = not all(map(torch.equal, before, after))
    return [math.isnan(loss), state.skipped.tolist(), changed]


def close(found: Any) -> Any:
    """Return figures that compare equal to others up to rounding."""
    if isinstance(found, list):
        return [close(part) for part in found]
    return pytest.approx(found, rel=1e-4)


def figures(job: RankJob) -> list[dict[str, Any]]:
    """Run this program on the ranks of `job`; return the figures of each rank, by stage."""
    artifacts.write_json(job.folder.job, job.model_dump(mode="json"))
    number = job.training.workload.ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        launch("ranks", job.folder.job, lambda event: None, ranks=number)
    return [artifacts.read_json(job.run_dir / f"rank{rank}.json") for rank in range(number)]


def work(job: RankJob, stop: Stop) -> None:
    make_deterministic()
    work = job.training.workload
    found: dict[int | str, Any] = {
        stage: at_stage(
            with_workload(job.training, zero_stage=stage),
            job.run_dir / f"stage{stage}",
            job.run_dir / "one",
        )
        for stage in ([work.zero_stage] if work.shard_group else STAGES)
    }
    if work.zero_stage == 3 and (group := work.shard_group):
        found |= {"over all": resharded(job.training, None)}
        found |= {"resharded": resharded(job.training, group)}
    if not work.shard_group:
        offloaded = with_workload(job.training, zero_stage=2, offload="optimizer")
        folder = job.run_dir / f"stage{OFFLOADED}"
        found |= {OFFLOADED: at_stage(offloaded, folder, job.run_dir / "one")}
    artifacts.write_json(job.run_dir / f"rank{zero.rank()}.json", found)
    if zero.rank() == 0:
        EVENTS.append(job.folder.events, Done())


PROGRAM = RankProgram(RankJob, work)
