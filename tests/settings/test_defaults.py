"""Default settings by size and device."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SHAPE

from zeroflow.data.corpus import CorpusConfig
from zeroflow.device import Device, known_gpu
from zeroflow.model.sizes import SIZES
from zeroflow.settings.defaults import fill
from zeroflow.settings.run_config import ModelChoice, RunConfig, TrainingChoice
from zeroflow.settings.settled import SettledTraining

CPU = Device(kind="cpu", name="a CPU", memory_bytes=16 * 2**30)
H200 = known_gpu("NVIDIA H200")
SYNTHETIC, SAMPLE = (CorpusConfig(data_mode=mode) for mode in ("synthetic", "sample"))


def filled(
    device: Device, size: str = "tiny", corpus: CorpusConfig = SYNTHETIC, **choice
) -> SettledTraining:
    run = RunConfig(model=ModelChoice(size=size), data=corpus, training=TrainingChoice(**choice))
    return fill(run, device)


@pytest.mark.parametrize("device", [CPU, H200], ids=["cpu", "gpu"])
@pytest.mark.parametrize("size", SIZES)
def test_every_setting_is_filled_in_and_given_ones_stay(device, size):
    chosen = {"seq_len": 512, "max_steps": 77, "schedule": "wsd", "sample_prompt": "", "z_loss": 1}
    choice = filled(device, size, **chosen)
    for name, value in chosen.items():
        assert getattr(choice, name) == value, name
    left_open = {name for name in TrainingChoice.model_fields if getattr(choice, name) is None}
    assert left_open == {"keep_every", "shard_group", "reshard_group"}, "of which None is a choice"


counts = st.none() | st.integers(1, 40)


@settings(max_examples=40)
@given(
    device=st.sampled_from([CPU, H200]),
    size=st.sampled_from(list(SIZES)),
    seq_len=st.none() | st.integers(500, 5000),
    gpus=st.none() | st.integers(1, 8),
    batch_size=counts,
    grad_accum_steps=counts,
)
def test_tokens_of_a_step_are_those_of_its_rows_with_any_settings(
    device, size, seq_len, gpus, batch_size, grad_accum_steps
):
    asked = {"gpus": gpus, "batch_size": batch_size, "grad_accum_steps": grad_accum_steps}
    choice = filled(device, size, seq_len=seq_len, **asked)
    for name, value in asked.items():
        assert value is None or getattr(choice, name) == value
    rows = choice.batch_size * choice.grad_accum_steps * choice.gpus
    assert rows * choice.seq_len == choice.batch_tokens


@settings(max_examples=40)
@given(
    gpus=st.integers(1, 8),
    rows=st.integers(1, 600),
    rest=st.sampled_from([0, 0, 0, 7]),
    seq_len=st.sampled_from([1000, 2048]),
    batch_size=counts,
    grad_accum_steps=counts,
)
def test_batch_given_in_tokens_is_split_evenly_or_refused_with_a_suggestion(
    gpus, rows, rest, seq_len, batch_size, grad_accum_steps
):
    counted = {"batch_size": batch_size, "grad_accum_steps": grad_accum_steps, "gpus": gpus}
    unit = math.prod(count or 1 for count in counted.values())
    possible = rows == unit if batch_size and grad_accum_steps else rows % unit == 0
    tokens = rows * seq_len + rest
    if rest or not possible:
        with pytest.raises(ValueError, match=r"use .*\d+$") as refused:
            filled(H200, seq_len=seq_len, batch_tokens=tokens, **counted)
        tokens = int(re.findall(r"\d+", str(refused.value))[-1])
    choice = filled(H200, seq_len=seq_len, batch_tokens=tokens, **counted)
    assert choice.batch_size * choice.grad_accum_steps * gpus * seq_len == tokens


def test_cpu_trains_for_minutes_with_a_lower_rate_for_its_small_batches():
    choice = filled(CPU)
    assert (choice.seq_len, choice.batch_tokens, choice.max_steps) == (256, 512, 200)
    assert (choice.precision, choice.compile) == ("fp32", False)
    assert choice.learning_rate == pytest.approx(filled(H200).learning_rate / 3)
    assert (choice.validate_every, choice.checkpoint_every, choice.log_interval) == (100, 40, 5)


def test_trained_model_continues_at_a_tenth_of_the_rate_for_random_weights():
    for device in (CPU, H200):
        continued = fill(RunConfig(model={"init_from": "run:mine"}), device)
        assert continued.learning_rate == pytest.approx(filled(device).learning_rate / 10)
    given = {"model": {"init_from": "run:mine"}, "training": {"learning_rate": 0.5}}
    assert fill(RunConfig.model_validate(given), CPU).learning_rate == 0.5


@pytest.mark.parametrize(
    ("steps", "warmup"), [(5, 0), (20, 2), (100, 10), (200, 10), (500, 10), (5000, 100)]
)
def test_warm_up_is_two_percent_and_a_tenth_of_a_short_run(steps, warmup):
    assert filled(CPU, max_steps=steps).warmup_steps == warmup
    assert filled(CPU, max_steps=steps, warmup_steps=0).warmup_steps == 0


def test_activations_are_recomputed_as_soon_as_a_row_would_not_fit():
    sizes = [(80, "none"), (30, "selective"), (24, "full")]
    for gigabytes, expected in sizes:
        gpu = H200.replace(memory_bytes=gigabytes * 2**30)
        assert filled(gpu, "medium").activation_checkpointing == expected
    small = H200.replace(memory_bytes=24 * 2**30)
    assert filled(small, "tiny").activation_checkpointing == "none"
    assert filled(H200, activation_checkpointing="full").activation_checkpointing == "full"


def test_custom_shape_has_the_defaults_of_the_nearest_size():
    medium = ModelChoice(**SIZES["medium"].model_dump(include=set(SHAPE.model_dump())))
    for model, size in ((ModelChoice(**SHAPE.model_dump()), "tiny"), (medium, "medium")):
        mine, named = (fill(RunConfig(model=one), H200) for one in (model, ModelChoice(size=size)))
        assert mine.learning_rate == named.learning_rate
        assert mine.batch_tokens == named.batch_tokens


def test_prompt_fits_the_text():
    assert filled(CPU, corpus=SAMPLE).sample_prompt == "def", "which is Python"
    assert filled(CPU).sample_prompt == "The"
