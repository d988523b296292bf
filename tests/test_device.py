"""The device that a run computes on."""

import os

import pytest
import torch

from zeroflow.device import cores, find_device, gpus_named, known_gpu


def test_cpu_is_found_without_a_peak():
    device = find_device("cpu")
    assert device.kind == "cpu" and device.peak_flops is None and device.memory_bytes > 2**28


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_is_refused_if_there_is_none_and_not_required_by_auto():
    assert find_device("auto").kind == "cpu"
    with pytest.raises(ValueError, match="--device cuda, but PyTorch sees no GPU"):
        find_device("cuda")


def test_gpu_is_found_by_a_unique_part_of_its_name():
    assert known_gpu("h100 80gb").name == "NVIDIA H100 80GB HBM3"
    for name in ("NVIDIA L4", "L4", "l4"):
        assert known_gpu(name).memory_bytes == 24 * 2**30, "not the L40S"
    with pytest.raises(ValueError, match="not one of: NVIDIA H200, "):
        known_gpu("Abacus")


def test_most_common_gpu_of_a_name_comes_first():
    assert known_gpu("H100").name == "NVIDIA H100 80GB HBM3"
    assert gpus_named("h100") == ["NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H100 PCIe"]


def test_gpu_that_is_not_known_has_the_memory_that_is_given():
    device = known_gpu("Abacus", 48)
    assert (device.name, device.memory_bytes, device.peak_flops) == ("Abacus", 48 * 2**30, None)
    assert device.has_bf16
    with pytest.raises(ValueError, match="--memory-gb -1: give the memory of the GPU in GB"):
        known_gpu("Abacus", -1)


def test_tables_of_gpus_match_their_generation():
    assert known_gpu("H200").has_bf16 and known_gpu("H200").compiles
    assert known_gpu("RTX 3090").capability < (8, 9), "no products in fp8"
    assert not find_device("cpu").has_bf16 and not find_device("cpu").compiles


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_those_that_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    assert cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
