"""Groups of ranks with a sharded state, which are replicas of each other, train like one process.

The tolerances are those of `test_zero`.
"""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from like_one_process import TrainsLikeOneProcess
from ranks import SAVED, STEPS
from tiny import MODEL, training_config, with_workload

from zeroflow.training import checkpoint
from zeroflow.training.config import TrainingConfig
from zeroflow.training.job import RankJob
from zeroflow.training.state import new_state
from zeroflow.training.tensor_files import TensorFiles

RANKS, GROUP = 4, 2
AT_STAGE_3 = pytest.mark.parametrize("stage", ["3"], indirect=True)
SLOW = pytest.mark.slow  # stage 3 also gathers and scatters in groups, and sums over them


@pytest.fixture(scope="module")
def config() -> TrainingConfig:
    """Settings of one process."""
    split = {"micro_batch_rows": 1, "accumulate": 2 * RANKS}
    return training_config(steps=STEPS + 1, device="cpu", deterministic=True, **split)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def alone(config: TrainingConfig, folder: Path) -> dict[str, Any]:
    state = new_state(config)
    found: dict[str, Any] = {"before": ranks.trained(state, config, SAVED)}
    ranks.saved(state, folder / "one")
    return found | {"continued": ranks.trained(state, config, STEPS - SAVED)}


@pytest.fixture(
    scope="module", params=[pytest.param("1", marks=SLOW), pytest.param("2", marks=SLOW), "3"]
)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def together(
    alone: dict[str, Any], config: TrainingConfig, folder: Path, stage: str
) -> list[dict[str, Any]]:
    """Figures of each rank, by stage."""
    split = {"accumulate": 2, "ranks": RANKS, "zero_stage": int(stage), "shard_group": GROUP}
    return ranks.figures(RankJob(run_dir=folder, training=with_workload(config, **split)))


class TestStage(TrainsLikeOneProcess):
    def test_ranks_of_a_group_share_the_state_and_each_group_has_all_of_it(self, together, stage):
        for found in (rank[stage] for rank in together):
            assert found["parameters"] == MODEL.parameters
            assert found["kept"] == found["moments kept"] == MODEL.parameters // GROUP

    def test_gradients_of_the_groups_are_summed_once_per_step(self, together, stage):
        """Two blocks and the rest make three parts; a step has two micro-batches."""
        gathered, scattered = {"1": (3, 3), "2": (3, 6), "3": (10, 6)}[stage]
        for rank in together:
            passed = rank[stage]["communicated"]
            assert (passed["gathered"], passed["scattered"]) == (gathered, scattered)
            # The gradients of three parts, the norm and the loss: stages 2 and 3 scatter gradients
            # after each micro-batch, and sum them over the groups once
            assert passed["summed"] == 5

    def test_checkpoint_has_each_tensor_once(self, together, folder, stage):
        path, of_one = (folder / name / f"step-{SAVED:08d}" for name in (f"stage{stage}", "one"))
        names: list[str] = []
        for file in path.glob("*.safetensors"):
            single = file.parent / file.stem
            single.mkdir()
            file.rename(single / file.name)
            with TensorFiles(single) as tensors:
                names += tensors
            (single / file.name).rename(file)
            single.rmdir()
        with TensorFiles(of_one) as tensors:
            assert sorted(names) == list(tensors)
        weights, others = (checkpoint.load_model(each).state_dict() for each in (path, of_one))
        for name, weight in weights.items():
            assert torch.allclose(weight, others[name], atol=1e-4), name


@AT_STAGE_3
def test_weights_resharded_within_groups_train_with_the_same_bits(together):
    for rank in together:
        over_all, resharded = rank["over all"], rank["resharded"]
        for name in ("before", "validation", "sample", "continued"):
            assert resharded[name] == over_all[name], name
        assert min(resharded["timeouts"]) >= 3600


@AT_STAGE_3
def test_resharded_weights_are_gathered_over_all_ranks_only_for_the_forward_pass(together):
    """Two blocks for each pass and the rest for both, in two micro-batches."""
    for rank in together:
        assert rank["over all"]["over"] == {"4": 10}
        assert rank["resharded"]["over"] == {"4": 6, "2": 4}
