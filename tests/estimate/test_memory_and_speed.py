from functools import partial
from typing import Any

import pytest
import torch
from tiny import MODEL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from zeroflow.device import Device, Load, known_gpu
from zeroflow.estimate import speed as speeds
from zeroflow.estimate.memory import (
    Memory,
    checkpoint_bytes,
    heap,
    host_state,
    is_measured,
    largest_micro_batch,
    memory,
)
from zeroflow.estimate.speed import assumed_mfu, expected_speed, fastest_on_cpu
from zeroflow.model.llama import Llama, ModelConfig
from zeroflow.model.sizes import NOMINAL_VOCABULARY, SIZES, with_vocabulary
from zeroflow.training.loss import cross_entropy_sum
from zeroflow.training.optimizers.adamw import AdamW
from zeroflow.training.workload import Workload

H200 = known_gpu("NVIDIA H200")
H100 = H200.replace(name="NVIDIA H100 80GB HBM3", memory_bytes=int(79.65 * 2**30))
CPU = Device(kind="cpu", name="some CPU", memory_bytes=2**33)


def llama(size: str, vocabulary: int = NOMINAL_VOCABULARY) -> ModelConfig:
    return with_vocabulary(SIZES[size], vocabulary)


def workload(model: ModelConfig, device: Device = H100, **changes: Any) -> Workload:
    """One micro-batch of a row per step, with the defaults of the device."""
    usual = {"seq_len": 2048, "micro_batch_rows": 1, "accumulate": 1}
    usual |= {"precision": "bf16" if device.has_bf16 else "fp32", "compile": device.compiles}
    return Workload(device=device.kind, device_name=device.name, model=model, **usual | changes)


def planned(model: ModelConfig, device: Device = H100, **changes: Any) -> Memory:
    """Memory of a step of several micro-batches, unless `changes` say otherwise."""
    return memory(workload(model, device, **{"accumulate": 2} | changes), device)


def rate(model: ModelConfig, device: Device = H100, **changes: Any) -> tuple[float | None, str]:
    speed, source = expected_speed(workload(model, device, **changes), device)
    return speed and speed.expected, source


def test_rate_on_a_known_gpu_is_a_share_of_its_peak():
    expected, source = rate(MODEL, H200, seq_len=128)
    assert expected == pytest.approx(0.28 * 989e12 / MODEL.flops_per_token(128))
    assert "28%" in source


@pytest.mark.parametrize(
    ("size", "vocabulary", "compiled", "tokens_per_second"),
    [
        ("tiny", 32_768, True, 2_623_363),
        ("tiny", 128_256, True, 1_184_000),
        ("small", 128_256, True, 229_200),
        ("medium", 128_256, True, 59_000),
        ("tiny", 32_768, False, 1_554_310),
        ("tiny", 128_256, False, 873_555),
        ("small", 128_256, False, 140_275),
        ("medium", 128_256, False, 37_154),
    ],
)
def test_assumed_rate_is_within_a_tenth_of_that_of_an_h100(
    size, vocabulary, compiled, tokens_per_second
):
    expected, source = rate(llama(size, vocabulary), compile=compiled)
    assert expected == pytest.approx(tokens_per_second, rel=0.1)
    assert ("without torch.compile" in source) != compiled


def test_recomputation_lowers_the_predicted_speed():
    rates = [
        rate(llama("medium"), activation_checkpointing=kind)[0]
        for kind in ("none", "selective", "full")
    ]
    assert rates == sorted(rates, reverse=True)
    assert 0.75 < rates[-1] / rates[0] < 0.8, "but for the head, a forward pass more"


def test_unknown_peak_gives_no_rate_and_no_guess():
    unknown = Device(kind="cuda", name="Some New GPU", memory_bytes=2**40)
    expected, source = rate(MODEL, unknown)
    assert expected is None and "peak of Some New GPU is not known" in source


def test_peak_in_bf16_gives_no_rate_in_fp32():
    expected, source = rate(MODEL, precision="fp32")
    assert expected is None and "only in bf16" in source


def test_rate_in_fp8_is_not_predicted_for_code_that_is_not_compiled():
    expected, source = rate(llama("tiny"), fp8=True, compile=False)
    assert expected is None and "only with compiled code" in source


def test_rate_on_a_cpu_is_measured():
    speed, source = expected_speed(workload(MODEL, CPU), CPU)
    assert speed is not None and 0 < speed.low < speed.expected < speed.high
    assert "measured now" in source


def test_small_model_gets_less_of_a_cpu_than_a_large_one():
    shares = [int(rate(model, CPU)[1].partition("%")[0]) for model in (MODEL, llama("tiny"))]
    assert shares == [2, 75]


@pytest.mark.parametrize("average", [0.1, 6.0])
def test_busy_cpu_may_become_idle(monkeypatch, average):
    """Programs that have just started are not in the load average yet, but slow down the plan."""
    monkeypatch.setattr(speeds, "_measure_idle_flops", lambda: 230e9)
    monkeypatch.setattr(speeds, "_measure_cpu_flops", lambda: 230e9)
    work, load = workload(MODEL, CPU), Load(average=average, cores=2)
    idle = expected_speed(work, CPU, Load(average=0, cores=2)).rate
    monkeypatch.setattr(speeds, "_measure_cpu_flops", lambda: 5e9)
    busy = expected_speed(work, CPU, load).rate
    assert idle is not None and busy is not None
    assert busy.high == idle.high > 100 * busy.expected
    crowded = 0.4 if average > 2 else 1
    assert busy.low == pytest.approx(0.25 * crowded * busy.expected)


def test_fastest_speed_on_a_cpu_covers_that_of_small_models_on_idle_cores(monkeypatch):
    """Measured after plans on a busy machine: 83,877 tokens/s of a model with 34,976 parameters."""
    monkeypatch.setattr(speeds, "_measure_idle_flops", lambda: 230e9)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = ModelConfig(hidden_size=32, intermediate_size=64, vocab_size=512, **shape)
    assert model.parameters == 34_976
    assert 83_877 < fastest_on_cpu(workload(model, CPU, seq_len=64)) < 3 * 83_877


def fitting(size: str, gigabytes: int, *kind: str, **changes: Any) -> tuple[int, str]:
    device = H200.replace(memory_bytes=gigabytes * 2**30)
    return largest_micro_batch(workload(llama(size), device, **changes), device, *kind)


def test_micro_batch_grows_with_memory_and_shrinks_with_the_model():
    rows = [fitting(size, 80)[0] for size in ("tiny", "small", "medium")]
    assert rows == sorted(rows, reverse=True) and rows[-1] > 1
    assert fitting("medium", 140)[0] > fitting("medium", 80)[0]


def test_largest_micro_batch_does_not_depend_on_that_of_the_workload():
    own = {"micro_batch_rows": 512, "accumulate": 1, "activation_checkpointing": "full"}
    assert fitting("medium", 80, **own) == fitting("medium", 80)


def test_activations_are_recomputed_if_they_would_not_fit():
    assert fitting("medium", 80)[1] == "none"
    assert fitting("medium", 24) == (1, "full")
    full = planned(llama("medium"), activation_checkpointing="full")
    rooms = [full.room(H200.replace(memory_bytes=size * 2**30)) for size in (28, 24, 22)]
    assert rooms == ["yes", "tight", "no"], "an H100 held 22.3 GiB"
    assert fitting("medium", 8) == (1, "full"), "a step of one row is always tried"
    rows = [fitting("small", 24, kind)[0] for kind in ("none", "selective", "full")]
    assert rows == sorted(rows) and rows[0] < rows[-1], "more fits if asked for"


@pytest.mark.parametrize(
    ("size", "rows", "kind", "gigabytes"),
    [
        ("tiny", 64, "none", 10.58),
        ("small", 32, "none", 37.44),
        ("medium", 12, "none", 63.91),
        ("medium", 4, "full", 24.37),
        ("medium", 8, "selective", 37.82),
        ("medium", 4, "none", 37.66),
        ("medium", 16, "full", 28.91),
    ],
)
def test_memory_is_that_of_an_h100(size, rows, kind, gigabytes):
    held = planned(llama(size), micro_batch_rows=rows, activation_checkpointing=kind)
    assert held.total / 2**30 == pytest.approx(gigabytes, rel=0.01)


QWEN3 = {"qk_norm": True, "features_per_head": 64}


@pytest.mark.parametrize(
    ("size", "rows", "context", "vocabulary", "changes"),
    [
        ("tiny", 4, 1024, 32_768, {}),
        ("tiny", 4, 1024, 32_768, QWEN3),
        ("tiny", 4, 512, 128_256, {}),
        ("small", 2, 1024, 32_768, {}),
    ],
)
def test_memory_on_a_cpu_is_what_pytorch_counts_in_a_fake_step(
    size, rows, context, vocabulary, changes
):
    model = llama(size, vocabulary).replace(num_hidden_layers=4)  # a fake step takes seconds too
    model = model.replace(**changes)
    held = planned(model, CPU, seq_len=context, micro_batch_rows=rows, accumulate=1)
    # The tracker does not see what the allocator takes for itself
    seen = held.weights + held.activations / heap(accumulates=False) + held.loss
    assert seen == pytest.approx(fake_step(model, rows, context), rel=0.05)


def fake_step(model: ModelConfig, rows: int, context: int) -> int:
    """Peak bytes of tensors in forward and backward, which allocate and compute nothing."""
    with FakeTensorMode():
        network = Llama(model)
        tokens = torch.zeros(rows, context, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(network)
        with tracker:
            network(tokens, partial(cross_entropy_sum, targets=tokens)).backward()
        [held] = tracker.get_tracker_snapshot("peak").values()
    return held["Total"]


@pytest.mark.parametrize(
    ("vocabulary", "context", "rows", "accumulate", "megabytes"),
    [
        (32_768, 256, 2, 1, 1002),
        (32_768, 256, 8, 1, 1397),
        (128_256, 256, 2, 1, 1998),
        (8192, 1024, 4, 1, 1339),
        (2048, 256, 16, 1, 1211),
        (32_768, 512, 1, 2, 1086),
        (32_768, 512, 4, 2, 1614),
        (32_768, 1024, 2, 2, 1598),
        (32_768, 2048, 1, 2, 1651),
        (32_768, 2048, 2, 2, 2172),
    ],
)
def test_memory_is_within_five_percent_of_runs_of_tiny_on_a_cpu(
    vocabulary, context, rows, accumulate, megabytes
):
    batch = {"seq_len": context, "micro_batch_rows": rows, "accumulate": accumulate}
    held = planned(llama("tiny", vocabulary), CPU, **batch)
    assert held.total / 2**20 == pytest.approx(megabytes, rel=0.05)


def test_formula_is_measured_for_plain_code_on_a_cpu_and_for_all_on_a_gpu():
    plain = workload(llama("tiny"), CPU)
    assert is_measured(plain)
    for change in ({"compile": True}, {"precision": "bf16"}, {"document_mask": True}):
        assert not is_measured(plain.replace(**change))
        assert is_measured(workload(llama("tiny"), **change))


def test_fp8_reduces_only_what_is_kept_for_the_backward_pass():
    for kind in ("none", "selective"):
        how = {"micro_batch_rows": 4, "activation_checkpointing": kind}
        bf16, fp8 = (planned(llama("medium"), fp8=on, **how) for on in (False, True))
        assert 0.5 * bf16.activations < fp8.activations < bf16.activations, kind
        assert fp8._replace(activations=bf16.activations) == bf16
    assert fitting("medium", 79, fp8=True) > fitting("medium", 79)


def test_rate_of_fp8_is_beside_the_one_without_which_is_higher_for_small_models():
    gains = []
    for size in ("tiny", "small", "medium"):
        (bf16, _), (fp8, source) = (rate(llama(size), fp8=on) for on in (False, True))
        gains.append(fp8 / bf16)
        with_it, without = (assumed_mfu(workload(llama(size), fp8=on)) for on in (True, False))
        assert f"assuming {with_it:.0%} MFU" in source
        assert f"with fp8 and {without:.0%} without" in source
    assert gains == sorted(gains) and gains[0] < 1 < gains[-1]


@pytest.mark.parametrize(
    ("size", "rows", "accumulate", "gigabytes"),
    [
        ("tiny", 12, 2, 6.123),
        ("tiny", 24, 2, 6.924),
        ("tiny", 48, 1, 8.355),
        ("medium", 6, 2, 40.817),
        ("medium", 12, 2, 55.708),
    ],
)
def test_memory_in_fp8_is_that_of_an_h100(size, rows, accumulate, gigabytes):
    held = planned(llama(size), micro_batch_rows=rows, fp8=True, accumulate=accumulate)
    assert held.total / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(
    ("size", "rows", "accumulate", "kind", "precision", "compiled", "gibibytes"),
    [
        ("tiny", 8, 2, "none", "fp32", True, 6.310),
        ("small", 8, 2, "selective", "fp32", True, 16.436),
        ("medium", 4, 2, "full", "fp32", True, 26.684),
        ("tiny", 8, 2, "none", "fp32", False, 6.736),
        ("small", 8, 2, "selective", "fp32", False, 18.193),
        ("medium", 4, 2, "full", "fp32", False, 26.747),
        ("tiny", 32, 2, "none", "bf16", False, 9.320),
        ("small", 16, 1, "none", "bf16", False, 30.032),
        ("small", 16, 2, "selective", "bf16", False, 21.988),
        ("medium", 6, 2, "none", "bf16", False, 54.698),
        ("medium", 6, 2, "full", "bf16", False, 25.914),
    ],
)
def test_memory_of_other_code_is_that_of_an_h100(
    size, rows, accumulate, kind, precision, compiled, gibibytes
):
    held = planned(
        llama(size),
        micro_batch_rows=rows,
        accumulate=accumulate,
        activation_checkpointing=kind,
        precision=precision,
        compile=compiled,
    )
    assert held.total / 2**30 == pytest.approx(gibibytes, rel=0.01)


@pytest.mark.parametrize(
    ("size", "rows", "accumulate", "kind", "gibibytes"),
    [
        ("tiny", 32, 1, "none", {0: 7.60, 1: 7.35, 2: 7.34, 3: 7.34}),
        ("small", 16, 1, "none", {0: 22.70, 1: 20.94, 2: 20.94, 3: 20.62}),
        ("medium", 4, 1, "none", {0: 33.97, 1: 26.54, 2: 26.54, 3: 24.52}),
        ("medium", 4, 2, "none", {0: 38.98, 1: 31.46, 2: 29.94, 3: 28.01}),
        ("medium", 16, 2, "full", {0: 30.93, 1: 23.41, 3: 19.95}),
    ],
)
def test_memory_of_two_ranks_is_that_of_two_h100s(size, rows, accumulate, kind, gibibytes):
    how = {"micro_batch_rows": rows, "accumulate": accumulate, "activation_checkpointing": kind}
    for stage, measured in gibibytes.items():
        held = planned(llama(size), zero_stage=stage, ranks=2, **how)
        assert held.total / 2**30 == pytest.approx(measured, rel=0.02), stage


@pytest.mark.parametrize(
    ("precision", "rows", "gibibytes"), [("fp32", 16, 8.858), ("bf16", 16, 7.298)]
)
def test_document_mask_is_planned_if_it_is_in_memory(precision, rows, gibibytes):
    plan = partial(planned, llama("tiny"), micro_batch_rows=rows, precision=precision)
    held = plan(compile=False, document_mask=True)
    assert held.total / 2**30 == pytest.approx(gibibytes, rel=0.02)
    assert plan(compile=True, document_mask=True) == plan(compile=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_groups_need_the_memory_of_as_many_ranks(stage):
    """This includes communication buffers, because FSDP2 gathers the same tensors."""
    in_groups = planned(llama("tiny"), zero_stage=stage, ranks=8, shard_group=2)
    assert in_groups == planned(llama("tiny"), zero_stage=stage, ranks=2)
    assert in_groups.total > planned(llama("tiny"), zero_stage=stage, ranks=8).total


def test_resharding_within_a_group_keeps_a_shard_of_the_gathered_blocks():
    model = llama("tiny")
    plan = partial(planned, model, zero_stage=3, ranks=8)
    blocks = model.num_hidden_layers * model.block_parameters
    for group in (2, 4):
        kept = plan(reshard_group=group).total - plan().total
        assert kept == pytest.approx(2 * blocks / group, abs=group), "in bf16"
    assert plan(reshard_group=8) == plan()
    assert plan(reshard_group=2, zero_stage=2) == plan(zero_stage=2)


@pytest.mark.parametrize("ranks", [1, 4])
def test_offloaded_state_is_on_the_host_and_only_copies_are_on_the_gpu(ranks):
    model = llama("medium")
    P = model.parameters
    blocks = P - model.embedding_parameters - model.hidden_size
    plan = partial(workload, model, ranks=ranks, accumulate=2, offload="optimizer")
    held = {stage: memory(plan(zero_stage=stage), H100) for stage in (1, 2, 3)}
    for stage, on_gpu in held.items():
        assert (on_gpu.weights, on_gpu.moments) == (0, 0)
        assert on_gpu.gradients == (4 * P if stage == 1 else 0)
        assert on_gpu.activations == held[1].activations
        on_host = host_state(plan(zero_stage=stage))
        assert on_host == (4 * P // ranks, 4 * P // ranks, 8 * P // ranks)
    kept = (1 if ranks == 1 else 2) * blocks // model.num_hidden_layers
    left = 4 * (P - blocks)  # the buffer of the embedding's gradient of an earlier micro-batch
    copies = {1: 2 * P, 2: 2 * P + left, 3: 2 * (P - blocks + kept) + left}
    for stage, copied in copies.items():  # the peak is in the loss, or as high just after it
        assert held[stage].communication == pytest.approx(copied, rel=1e-4)
    assert host_state(workload(model)) is None


def test_ranks_shard_more_from_stage_to_stage():
    plan = partial(planned, llama("medium"), micro_batch_rows=4)
    memories = [plan(zero_stage=stage, ranks=4) for stage in (0, 1, 2, 3)]
    totals = [memory.total for memory in memories]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    state = [memory.weights + memory.gradients + memory.moments for memory in memories]
    parameters = llama("medium").parameters
    assert state == [16 * parameters, 7 * parameters, 4 * parameters, 4 * parameters]
    assert memories[3].communication < memories[2].communication, "weights are not held whole"
    assert plan(zero_stage=3) == plan()


class Frugal(AdamW):
    """An optimiser with a byte of state per parameter."""

    def state_bytes(self, model: ModelConfig) -> int:
        return model.parameters


def test_optimiser_state_has_the_planned_size():
    model = llama("tiny")
    usual, frugal = planned(model), planned(model, optimizer=Frugal())
    assert usual.moments == 8 * model.parameters and frugal.moments == model.parameters
    assert checkpoint_bytes(workload(model, optimizer=Frugal())) == 5 * model.parameters


def test_checkpoint_has_weights_and_two_moments_in_four_bytes_each():
    assert checkpoint_bytes(workload(MODEL)) == 3 * 4 * MODEL.parameters
