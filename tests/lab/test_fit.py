"""The largest micro-batch and model under a cap of memory, by the formula."""

import pytest
from tiny import WORKLOAD

from zeroflow.device import Device
from zeroflow.estimate import memory as plan
from zeroflow.lab.fit import largest, predicted_peak

CPU = Device(kind="cpu", name="some CPU", memory_bytes=2**34)
GPU = Device(kind="cuda", name="NVIDIA H200", memory_bytes=141 * 10**9, capability=(9, 0))
WORKS = [WORKLOAD.replace(ranks=2, accumulate=2, zero_stage=stage) for stage in range(4)]


@pytest.mark.parametrize(("device", "cap"), [(CPU, 10**6), (GPU, 2 * 10**6)])
def test_largest_sizes_fit_and_one_more_does_not(device, cap):
    for work in (work.replace(device=device.kind) for work in WORKS):
        sizes = largest(work, device, cap)
        rows, blocks = sizes.fits
        for fit in sizes.fits:
            assert predicted_peak(fit.workload, device) <= cap < predicted_peak(fit.above, device)
        assert rows.workload == work.replace(micro_batch_rows=rows.workload.micro_batch_rows)
        model = work.model.replace(num_hidden_layers=blocks.workload.model.num_hidden_layers)
        assert blocks.workload == work.replace(model=model)


def test_a_higher_stage_fits_more():
    sizes = [largest(work, CPU, 10**6) for work in WORKS]
    rows = [one.rows.workload.micro_batch_rows for one in sizes if one.rows]
    blocks = [one.blocks.workload.model.num_hidden_layers for one in sizes if one.blocks]
    assert rows == sorted(rows) and rows[0] < rows[-1]
    assert blocks == sorted(blocks) and blocks[0] < blocks[-1]


def test_what_never_fits_is_none():
    one_row = WORKS[0].replace(micro_batch_rows=1)
    cap = predicted_peak(one_row, CPU) - 1
    assert largest(WORKS[0], CPU, cap).rows is None
    assert largest(WORKS[0], CPU, 1).fits == ()


def test_figure_of_the_plan_limits_a_gpu():
    work = WORKS[3].replace(device="cuda")
    assert predicted_peak(work, GPU) == plan.memory(work, GPU).total
