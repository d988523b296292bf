"""Groups of ranks with a sharded state, which are replicas of each other, train like one process.

The tolerances are those of `test_zero`.
"""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import SAVED, STAGES, STEPS, close
from tiny import MODEL, training_config, with_workload

from zeroflow.training import checkpoint
from zeroflow.training.config import TrainingConfig
from zeroflow.training.job import RankJob
from zeroflow.training.state import new_state
from zeroflow.training.tensor_files import TensorFiles

RANKS, GROUP = 4, 2
SHARDED = [str(stage) for stage in STAGES[1:]]


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


@pytest.fixture(scope="module")
def together(alone: dict[str, Any], config: TrainingConfig, folder: Path) -> list[dict[str, Any]]:
    """Figures of each rank, by stage."""
    split = {"accumulate": 2, "ranks": RANKS, "shard_group": GROUP}
    return ranks.figures(RankJob(run_dir=folder, training=with_workload(config, **split)))


@pytest.mark.parametrize("stage", SHARDED)
class TestStage:
    def test_losses_norms_and_updates_match_one_process(self, alone, together, stage):
        for rank in together:
            for name in ("before", "continued"):
                assert rank[stage][name] == close(alone[name]), name

    def test_resume_from_a_checkpoint_is_bit_exact(self, together, stage):
        assert together[0][stage]["resumed"] == together[0][stage]["continued"]

    def test_groups_resume_from_one_process_and_one_process_from_groups(
        self, alone, together, config, folder, stage
    ):
        assert together[0][stage]["from one process"] == close(alone["continued"])
        state = ranks.loaded(config, folder / f"stage{stage}")
        assert ranks.trained(state, config, STEPS - SAVED) == close(alone["continued"])

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
            # stage 1 reduces gradients once per step, stages 2 and 3 after each micro-batch
            assert passed["summed"] == together[0]["1"]["communicated"]["summed"]

    def test_nan_loss_of_one_rank_leaves_the_weights_of_all_ranks_unchanged(self, together, stage):
        for rank in together:
            assert rank[stage]["skipped"] == [True, [1, 1], False]

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
