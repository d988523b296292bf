import format1
import pytest
import torch
from tiny import MODEL, WORKLOAD

from zeroflow.device import known_gpu
from zeroflow.model import fp8, llama
from zeroflow.training.optimizers.adamw import AdamW
from zeroflow.training.workload import Workload

TWO = WORKLOAD.replace(ranks=2, zero_stage=3, micro_batch_rows=6, accumulate=4, seq_len=16)
H100 = known_gpu("H100 80GB")


def test_rows_and_tokens_of_a_batch_are_those_of_all_ranks():
    assert (TWO.rank_rows, TWO.batch_rows, TWO.batch_tokens) == (24, 48, 768)
    assert TWO.batch_shape == (4, 2, 6)
    assert TWO.accumulates and not WORKLOAD.accumulates


@pytest.mark.parametrize(("limit", "split"), [(6, (6, 4)), (5, (4, 6)), (1, (1, 24)), (9, (8, 3))])
def test_rows_of_a_step_stay_the_same_for_any_split(limit, split):
    other = TWO.split(limit)
    assert (other.micro_batch_rows, other.accumulate) == split
    assert other.batch_rows == TWO.batch_rows


def test_devices_are_described_with_the_stage_if_there_are_several():
    gpu = TWO.replace(device="cuda", device_name="NVIDIA H200")
    assert gpu.devices == "2 x NVIDIA H200, ZeRO stage 3"
    assert gpu.replace(ranks=1).devices == "NVIDIA H200"
    assert TWO.devices == "2 processes on one some CPU, ZeRO stage 3"


def test_arithmetic_of_the_products():
    bf16 = WORKLOAD.replace(precision="bf16")
    in_fp8 = bf16.replace(fp8=True)
    formats = [
        (work.arithmetic, work.dtype, work.significand_bits, work.linear)
        for work in (WORKLOAD, bf16, in_fp8)
    ]
    assert formats == [
        ("fp32", torch.float32, 24, llama.linear),
        ("bf16", torch.bfloat16, 8, llama.linear),
        ("bf16 with products in fp8", torch.bfloat16, 4, fp8.linear),
    ]


def test_workloads_cost_the_same_with_any_optimiser_settings():
    other = WORKLOAD.replace(optimizer=AdamW(weight_decay=0.3))
    assert other != WORKLOAD and other.costs_as_much_as(WORKLOAD)
    assert other.mathematics != WORKLOAD.mathematics
    assert not WORKLOAD.replace(accumulate=2).costs_as_much_as(WORKLOAD)


def test_other_sizes_use_the_same_code_and_other_settings_do_not():
    wide = MODEL.replace(hidden_size=64)
    larger = WORKLOAD.replace(model=wide, seq_len=99, micro_batch_rows=9, accumulate=9)
    assert larger.is_computed_like(WORKLOAD)
    for change in ({"compile": True}, {"device_name": "another CPU"}, {"ranks": 2}):
        assert not larger.is_computed_like(WORKLOAD.replace(**change))


def test_rounding_and_devices_are_not_mathematics():
    how = {"device": "cuda", "device_name": "a GPU", "precision": "bf16", "compile": True}
    assert WORKLOAD.replace(**how).mathematics == WORKLOAD.mathematics
    split = {"micro_batch_rows": 1, "accumulate": 1, "ranks": 2}
    assert WORKLOAD.replace(**split).mathematics == WORKLOAD.mathematics
    assert WORKLOAD.replace(accumulate=2).mathematics != WORKLOAD.mathematics


def test_fp8_is_checked_only_if_it_is_requested():
    cpu = H100.replace(kind="cpu", capability=None)
    WORKLOAD.require_possible_on(cpu)
    in_fp8 = WORKLOAD.replace(precision="bf16", fp8=True, seq_len=32)
    in_fp8.require_possible_on(H100)
    with pytest.raises(ValueError, match="the device is a CPU"):
        in_fp8.require_possible_on(cpu)
    with pytest.raises(ValueError, match="multiples of 16, but --seq-len is 12"):
        in_fp8.replace(seq_len=12).require_possible_on(H100)


def test_workload_of_format_1_is_read():
    read = Workload.model_validate(format1.WORKLOAD)
    assert (read.device, read.device_name) == ("cpu", "x86_64 CPU, 2 threads")
    assert (read.ranks, read.optimizer) == (1, AdamW())
    assert Workload.model_validate_json(read.model_dump_json()) == read
    gpus = format1.WORKLOAD | {"device": "NVIDIA H200", "gpus": 4}
    assert Workload.model_validate(gpus).devices == "4 x NVIDIA H200, ZeRO stage 0"


def test_step_on_fewer_machines_has_the_same_rows_in_micro_batches_that_are_not_larger():
    planned = WORKLOAD.replace(ranks=8, nodes=4, micro_batch_rows=3, accumulate=2)
    fewer = planned.on_machines(3)
    assert (fewer.ranks, fewer.nodes) == (6, 3)
    assert fewer.batch_rows == planned.batch_rows == 48
    assert (fewer.micro_batch_rows, fewer.accumulate) == (2, 4)
    with pytest.raises(ValueError, match="10 ranks of 5 machines cannot share the 48 rows"):
        planned.on_machines(5)
