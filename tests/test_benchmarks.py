"""The benchmarks of the training step, at a shape that takes no time."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import profile_step
import train_speed

from zeroflow.planning import Device
from zeroflow.training.loop import ComputeConfig

torch.set_num_threads(1)  # such small matrices only wait for a second thread

WORK = train_speed.Workload(
    size="tiny",
    vocab_size=256,
    seq_len=16,
    batch_rows=2,
    rows=(2,),
    compute=ComputeConfig(device="cpu", precision="fp32", compile=False),
    windows=1,
    seconds=0.01,
)
DEVICE = Device(kind="cpu", name="a CPU", memory_bytes=2**30)


@pytest.mark.parametrize("contender", ["ours", "hf_eager"])
def test_contenders_train_the_same_shape(contender):
    for figures in train_speed.measure(contender, WORK):
        first, last = figures["losses"]
        assert first == pytest.approx(math.log(WORK.vocab_size), abs=0.3)
        assert last < first
        assert figures["tokens_per_second"] > 0


def test_contender_that_takes_too_long_is_ended_with_its_reason():
    outcome = train_speed.try_in_process("ours", WORK, limit=0.1)
    assert outcome == {"trials": [], "failed": "stopped after 0 s (--limit)"}


def test_rows_are_doubled_up_to_the_batch():
    assert train_speed.doublings(48) == [3, 6, 12, 24, 48]


def test_profile_shares_out_all_of_the_time():
    step = train_speed.ours(WORK, rows=2)
    kernels, span = profile_step.profile_steps(step, WORK, steps=1)
    figures = profile_step.summarise(kernels, span, steps=1, top=5)
    assert sum(figures["families"].values()) == pytest.approx(figures["busy_ms"])
    assert {"GEMM", "attention", "cross-entropy", "optimiser"} <= figures["families"].keys()
    assert "| GEMM |" in profile_step.report(figures | {"peak_gb": 1.0}, DEVICE, WORK)


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopB_NTT", "GEMM"),
        ("nvjet_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT", "GEMM in fp8"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_view_3", "norms, pointwise"),
        ("triton_red_fused__log_softmax_nll_loss_forward_0", "cross-entropy"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, family):
    assert profile_step.family(kernel) == family
