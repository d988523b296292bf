"""One rank whose state is in host memory trains like one whose state is on the device.

On a CPU, both are in the same memory, and the same kernels run in the same order, so all bits are
equal. On a GPU, the norm of the gradients and AdamW are computed by other kernels, on the host.
AdamW divides by roots of small numbers, so after some steps figures differ by about 1e-6, and the
tests allow 1e-4, as `test_zero` does. If a part of the state were forgotten or counted twice,
losses would change by more than 1e-2.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks
import torch
from ranks import SAVED, STEPS, close
from tiny import MODEL, NO_END, RandomBatches, training_config, with_workload

from zeroflow.checks import model_checks, overfit, step_checks
from zeroflow.checks.overfit import FixedBatch, OverfitConfig
from zeroflow.data.batches import to_micro_batch
from zeroflow.device import find_device
from zeroflow.estimate.memory import host_state, memory
from zeroflow.model.llama import ModelConfig
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.loop import train_step
from zeroflow.training.rank_program import make_deterministic
from zeroflow.training.state import new_state

OFFLOADED_STAGES = (1, 2, 3)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def settings(device: str, **changes: Any) -> TrainingConfig:
    """Return the settings of a rank with four micro-batches per step, in fp32."""
    split = {"micro_batch_rows": 1, "accumulate": 4, "deterministic": True}
    return training_config(steps=STEPS + 1, device=device, **split | changes)


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        make_deterministic()
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def alone(device: str, folder: Path) -> dict[str, Any]:
    """Figures of a rank whose state is on the device."""
    return ranks.alone(settings(device), folder)


@pytest.fixture(scope="module", params=OFFLOADED_STAGES)
def config(device: str, request: pytest.FixtureRequest) -> TrainingConfig:
    return with_workload(settings(device), offload="optimizer", zero_stage=request.param)


@pytest.fixture(scope="module")
def offloaded(alone: dict[str, Any], config: TrainingConfig, folder: Path) -> dict[str, Any]:
    """Figures of a rank whose state is in host memory."""
    with zero.process_group(config.workload.device, alone=True):
        return ranks.at_stage(config, folder / f"stage{config.workload.zero_stage}", folder / "one")


def like(figures: Any, device: str) -> Any:
    """Return figures that compare equal to those of the same kernels, or of similar ones."""
    return figures if device == "cpu" else close(figures)


def test_losses_norms_and_updates_match_the_state_on_the_device(alone, offloaded, device):
    assert offloaded["before"] == like(alone["before"], device)
    assert offloaded["continued"] == like(alone["continued"], device)


def test_validation_and_samples_match(alone, offloaded, device):
    assert offloaded["validation"] == like(alone["validation"], device)
    assert offloaded["sample"] == alone["sample"]


def test_resume_is_bit_exact(offloaded):
    assert offloaded["resumed"] == offloaded["continued"]


def test_state_moves_to_the_host_and_back_at_a_resume(alone, offloaded, config, folder, device):
    assert offloaded["from one process"] == like(alone["continued"], device)
    on_device = settings(device)
    state = ranks.loaded(on_device, folder / f"stage{config.workload.zero_stage}")
    resumed = ranks.trained(state, on_device, STEPS - SAVED)
    assert resumed == like(alone["continued"], device)


def test_nan_loss_leaves_the_weights_unchanged(offloaded):
    assert offloaded["skipped"] == [True, [1, 1], False]


def test_one_rank_sends_nothing(offloaded):
    assert offloaded["communicated"] == {"gathered": 0, "scattered": 0, "summed": 0}


def test_preflight_checks_pass(config, tmp_path):
    with zero.process_group(config.workload.device, alone=True):
        state = new_state(config)
        for check in model_checks.checks(state, config):
            assert check.passed, check
        assert step_checks.round_trip(state, tmp_path, ranks.TOKENIZER).passed


def test_overfit_check_passes(device):
    longer = training_config(steps=200, device=device, offload="optimizer", zero_stage=2)
    rows = np.random.default_rng(0).integers(MODEL.vocab_size, size=(2, 17), dtype=np.int32)
    batch = FixedBatch(to_micro_batch(rows, end_of_text=NO_END))
    with zero.process_group(device, alone=True):
        state = new_state(longer)
        found = overfit.overfit(state, batch, longer, OverfitConfig(overfit_steps=80))
    assert found is not None and found.passed, found


def test_state_is_in_host_memory_and_computation_on_the_device(config, device):
    with zero.process_group(device, alone=True):
        state = new_state(config)
        train_step(state, RandomBatches(rows=1, accumulate=4).micro_batches(0), config)
        parameters = [parameter for _, parameter in zero.named_parameters(state.model)]
        tensors = [zero.local_shard(parameter) for parameter in parameters]
        for parameter in parameters:
            tensors += map(zero.local_shard, state.optimizer.state[parameter].values())
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert zero.device_of(state.model).type == device == state.skipped.device.type
        if device == "cuda":
            assert all(zero.local_shard(parameter).is_pinned() for parameter in parameters)


# Only on a GPU

WIDE = ModelConfig(
    hidden_size=2048,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=5632,
    vocab_size=32768,
)
"""State of 6.9 GB, so that the 32 MiB that cuBLAS takes are below one percent."""


def wide(stage: int, *, compile: bool = False, accumulate: int = 2) -> TrainingConfig:
    return training_config(
        steps=4,
        peak=1e-3,
        model=WIDE,
        device="cuda",
        seq_len=1024,
        micro_batch_rows=4,
        accumulate=accumulate,
        precision="bf16",
        compile=compile,
        offload="optimizer",
        zero_stage=stage,
    )


class WideBatches:
    def __init__(self, accumulate: int) -> None:
        self._accumulate = accumulate

    def micro_batches(self, step: int) -> list[Any]:
        generator = np.random.default_rng(step)
        return [
            to_micro_batch(
                generator.integers(WIDE.vocab_size, size=(4, 1025), dtype=np.int32),
                end_of_text=NO_END,
            )
            for _ in range(self._accumulate)
        ]


class Footprint(NamedTuple):
    """Bytes of a step."""

    peak: int
    """Largest number on the GPU."""

    weights: int
    """Weights in host memory."""

    moments: int
    """Moments in host memory."""


def footprint(config: TrainingConfig) -> Footprint:
    """Return the memory of the second step, which has everything that the first has allocated."""
    torch.compiler.reset()
    with zero.process_group("cuda", alone=True):
        state = new_state(config)
        batches = WideBatches(config.workload.accumulate)
        for step in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            train_step(state, batches.micro_batches(step), config).loss.item()
        peak = torch.cuda.max_memory_allocated()
        weights = [parameter for _, parameter in zero.named_parameters(state.model)]
        moments = [m for weight in weights for m in state.optimizer.state[weight].values()]
        on_host = [sum(zero.local_shard(t).nbytes for t in part) for part in (weights, moments)]
        del state, weights, moments
    gc.collect()
    torch.cuda.empty_cache()
    return Footprint(peak, *on_host)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(
    ("stage", "compile", "accumulate"),
    [(1, False, 2), (2, False, 1), (2, False, 2), (3, False, 2), (2, True, 2), (3, True, 1)],
)
def test_peak_on_the_gpu_and_state_on_the_host_are_as_planned(stage, compile, accumulate):
    config = wide(stage, compile=compile, accumulate=accumulate)
    found, on_host = footprint(config), host_state(config.workload)
    planned = memory(config.workload, find_device("cuda"))
    assert planned.total == pytest.approx(found.peak, rel=0.03), planned
    assert on_host is not None and on_host.weights == found.weights
    # Each moment also has a counter of steps
    assert on_host.moments == pytest.approx(found.moments, rel=1e-4)


@pytest.mark.gpu
@NEEDS_GPU
def test_training_in_bf16_is_like_that_on_the_device_up_to_rounding():
    """FSDP2 also rounds the weights of norms to bf16, which changes losses in the third digit."""
    config = settings("cuda", precision="bf16", deterministic=False)
    on_device = ranks.trained(new_state(config), config, STEPS)
    moved = with_workload(config, offload="optimizer", zero_stage=2)
    with zero.process_group("cuda", alone=True):
        on_host = ranks.trained(new_state(moved), moved, STEPS)
    for one, other in zip(on_device, on_host, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)
