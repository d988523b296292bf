"""Ranks train like one process, at every ZeRO stage, on a CPU and on two GPUs, in fp32.

Sums over ranks have another order than those of one process, and AdamW divides by roots of small
numbers. So figures differ by about 1e-6 after a few steps, and the tests allow 1e-4. If a part were
forgotten or counted twice, losses would change by more than 1e-2.
"""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from like_one_process import TrainsLikeOneProcess
from ranks import OFFLOADED, SAVED, STAGES, STEPS, close
from safetensors import safe_open
from tiny import MODEL, training_config, with_workload

from zeroflow import artifacts
from zeroflow.training import checkpoint
from zeroflow.training.config import TrainingConfig
from zeroflow.training.job import RankJob

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def settings(device: str) -> TrainingConfig:
    """Return the settings of one process."""
    split = {"micro_batch_rows": 1, "accumulate": 4}
    return training_config(steps=STEPS + 1, device=device, deterministic=True, **split)


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]
)
def config(request: pytest.FixtureRequest) -> TrainingConfig:
    return settings(request.param)


@pytest.fixture(scope="module")
def folder(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(config: TrainingConfig, folder: Path) -> dict[str, Any]:
    """Figures of one process."""
    return ranks.alone(config, folder)


@pytest.fixture(scope="module")
def together(alone: dict[str, Any], config: TrainingConfig, folder: Path) -> list[dict[str, Any]]:
    """Figures of each of two ranks, by stage."""
    training = with_workload(config, accumulate=2, ranks=2)
    return ranks.figures(RankJob(run_dir=folder, training=training))


@pytest.mark.parametrize("stage", [*map(str, STAGES), OFFLOADED])
class TestStage(TrainsLikeOneProcess):
    def test_validation_and_samples_match_one_process(self, alone, together, stage):
        assert together[0][stage]["validation"] == close(alone["validation"])
        assert together[0][stage]["sample"] == alone["sample"]

    def test_ranks_report_the_same_figures(self, together, stage):
        assert together[0][stage] == together[1][stage]

    def test_ranks_keep_their_share_and_one_copy_of_the_tied_embedding(self, together, stage):
        for found in (rank[stage] for rank in together):
            assert found["parameters"] == MODEL.parameters
            assert found["kept"] == MODEL.parameters // (1 if stage == "0" else 2)
            assert found["moments kept"] == found["kept"]

    def test_ranks_wait_for_one_that_compiles_for_an_hour(self, together, stage):
        assert min(together[0][stage]["timeouts"]) >= 3600

    def test_each_stage_communicates_only_what_it_shards(self, together, stage):
        """Two blocks and the rest make three parts; a step has two micro-batches."""
        gathered, scattered = {
            "0": (0, 0),  # gradients are summed instead
            "1": (3, 3),
            "2": (3, 6),
            OFFLOADED: (3, 6),
            "3": (10, 6),  # blocks for the forward and the backward pass, the rest for both
        }[stage]
        for rank in together:
            passed = rank[stage]["communicated"]
            assert (passed["gathered"], passed["scattered"]) == (gathered, scattered)


def test_checkpoints_have_the_same_tensors_for_any_number_of_writers(together, folder):
    of_one, *of_ranks = (
        checkpoint.load_model(folder / name / f"step-{SAVED:08d}").state_dict()
        for name in ("one", *(f"stage{stage}" for stage in STAGES))
    )
    for of_stage in of_ranks:
        assert of_stage.keys() == of_one.keys()
        for name, weight in of_one.items():
            assert of_stage[name].shape == weight.shape
            assert (of_stage[name] - weight).abs().max() < 1e-4, name


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_writes_its_half_of_a_checkpoint(together, folder, stage):
    path = folder / f"stage{stage}" / f"step-{SAVED:08d}"
    sizes = []
    for rank in (1, 2):
        files = [path / f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "state")]
        sizes.append(sum(file.stat().st_size for file in files))
    # Tensors are not cut: the larger half has up to one embedding and its two moments more
    largest = 4 * MODEL.vocab_size * MODEL.hidden_size
    assert abs(sizes[0] - sizes[1]) <= largest
    index = artifacts.read_json(path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 4 * MODEL.parameters
    for name, file in index["weight_map"].items():
        with safe_open(path / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118, not a mapping
