"""The benchmarks, with shapes that take almost no time."""

import argparse
import logging
import math
import os
import sys
from argparse import Namespace
from pathlib import Path

import checkpoint_stall
import data_path
import hub_faults
import loss_curves
import profile_step
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scale
import startup
import torch
import train_speed
import zero_stages
from torch import Tensor

from zeroflow.data.corpus import CorpusConfig
from zeroflow.device import Device, known_gpu
from zeroflow.estimate.memory import checkpoint_bytes
from zeroflow.model import fp8
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.training.schedule import Schedule
from zeroflow.training.workload import Workload

torch.set_num_threads(1)  # such small matrices only wait for a second thread

WORKLOAD = Workload(
    device="cpu",
    device_name="a CPU",
    model=with_vocabulary(SIZES["tiny"], 256),
    seq_len=16,
    micro_batch_rows=2,
    accumulate=1,
    precision="fp32",
    compile=False,
)
TASK = train_speed.Task(
    size="tiny", vocab_size=256, workload=WORKLOAD, rows=(2,), windows=1, seconds=0.01
)
DEVICE = Device(kind="cpu", name="a CPU", memory_bytes=2**30)
H100 = known_gpu("NVIDIA H100 80GB HBM3")


@pytest.fixture
def quick_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the same rounded factors in fp32; in fp8 some CPUs take minutes for a test."""

    def product(
        a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
    ) -> Tensor:
        return (a.float() @ b.float() * a_scale * b_scale).to(dtype)

    monkeypatch.setattr(fp8, "product", product)


@pytest.mark.parametrize("contender", ["ours", "hf_eager"])
def test_contenders_train_the_same_shape(contender):
    for figures in train_speed.measure(contender, TASK):
        first, last = figures["losses"]
        assert first == pytest.approx(math.log(TASK.vocab_size), abs=0.3)
        assert last < first
        assert figures["tokens_per_second"] > 0


def test_ours_in_fp8_is_another_contender_if_the_device_supports_it(quick_fp8):
    name, settings = train_speed.parse_contender("ours:fp8=true")
    in_fp8 = TASK.replace(workload=WORKLOAD.replace(**settings))
    [figures] = train_speed.measure(name, in_fp8)
    [in_fp32] = train_speed.measure("ours", TASK)
    for mine, theirs in zip(figures["losses"], in_fp32["losses"], strict=True):
        assert mine != theirs and mine == pytest.approx(theirs, abs=0.02)
    train_speed.check(TASK, DEVICE)
    with pytest.raises(ValueError, match="the device is a CPU"):
        train_speed.check(in_fp8, DEVICE)
    workload = in_fp8.workload.replace(precision="bf16")
    train_speed.check(in_fp8.replace(workload=workload), H100)


@pytest.mark.slow
def test_ours_with_document_mask_is_another_contender():
    name, settings = train_speed.parse_contender("ours:document_mask=true,precision=fp32")
    shape = {"device": "cpu", "precision": "fp32", "vocab_size": 256, "seq_len": 256}
    measuring = {"batch_rows": 2, "rows": [2], "windows": 1, "seconds": 0.01}
    task = train_speed.asked_task(Namespace(**shape, **measuring), "tiny", settings)
    [[batch], *_] = task.batches(2)
    assert batch.documents.max() > 0, "some end in the middle of a row"
    [figures] = train_speed.measure(name, task)
    unmasked = task.workload.replace(document_mask=False)
    [whole] = train_speed.measure(name, task.replace(workload=unmasked))
    assert figures["losses"] != whole["losses"]


def test_checkpoints_are_saved_in_both_ways_and_compared_with_the_disk(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = checkpoint_stall.measure(TASK, tmp_path / "saves", saves=2)
    limits = found["limits"]
    assert limits.keys() == checkpoint_stall.WRITES.keys()
    for each in (*limits.values(), *(found[n] for n in ("alone", "verifying", "stalls"))):
        assert len(each) == 2 and min(each) > 0
    expected = checkpoint_bytes(WORKLOAD)
    assert found["gb"] * 1e9 == pytest.approx(expected, rel=0.1), "the newest one stays"
    assert found["steps_beside"] > 0
    bench = checkpoint_stall.Bench(TASK, tmp_path / "due")
    found["due"] = checkpoint_stall.frequent(bench, every=2, steps=6)
    assert found["due"]["due"] == 3 and 1 <= found["due"]["saved"] <= 3
    assert [path.name for path in (tmp_path / "due").iterdir()] == ["step-00000012"]
    checkpoint_stall.report(found | {"device": "a CPU", "size": "tiny"}, predicted=expected)
    assert "% of the disk's limit" in caplog.text and "of 3 were saved" in caplog.text


@pytest.mark.parametrize(
    "program",
    [
        *(checkpoint_stall, data_path, hub_faults, loss_curves),
        *(profile_step, train_speed, zero_stages),
    ],
    ids=lambda program: program.__name__,
)
def test_every_program_explains_its_flags(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0
    assert program.__doc__.split(".")[0] in " ".join(capsys.readouterr().out.split())


def test_all_data_paths_give_the_same_tokens(text, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    pq.write_table(pa.table({"id": text.texts, "text": text.texts}), folder / "0.parquet")
    job = data_path.Job(folder, text.tokenizer.path, tmp_path, threads=1)
    [all_tokens], [full_rows] = (path(job).values() for path in (data_path.ours, data_path.script))
    assert full_rows == all_tokens // data_path.ROW_TOKENS * data_path.ROW_TOKENS > 0


def test_stage_of_one_rank_is_a_plain_training(tmp_path):
    training = train_speed.training_config(TASK, 2)
    contender = zero_stages.Contender("ours", 0)
    job = zero_stages.StagesJob(run_dir=tmp_path, training=training, task=TASK, contender=contender)
    found = zero_stages.measure(job)
    assert (found["ranks"], found["stage"]) == (1, 0)
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["seconds_per_step"])
    assert found["loss"] < math.log(TASK.vocab_size) < found["memory"]


def test_stages_are_also_measured_in_groups():
    asked = argparse.Namespace(stages=[0, 3], shard_groups=[2, 4], peers=["ddp"])
    found = zero_stages.contenders(asked)
    names = ["stage 0", "stage 3", "stage 3 in groups of 2", "stage 3 in groups of 4", "DDP"]
    assert [one.name for one in found] == names
    work = found[2].of(WORKLOAD.replace(ranks=8))
    assert (work.zero_stage, work.shards) == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "stage"), [("ddp", 0), *(("deepspeed", n) for n in (1, 2, 3))])
def test_peers_of_the_stages_train_the_same_steps(peer, stage, monkeypatch):
    if peer == "deepspeed":
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("PYTHONPATH", str(Path(zero_stages.__file__).parent), prepend=os.pathsep)
    two_micro_batches = WORKLOAD.replace(micro_batch_rows=4)
    task = TASK.replace(workload=two_micro_batches)
    alone = zero_stages.of_ranks(task, 1, zero_stages.Contender("ours", 0))
    found = zero_stages.of_ranks(task, 2, zero_stages.Contender(peer, stage))
    assert found["losses"] == pytest.approx(alone["losses"], abs=2e-6), "they differ by rounding"
    assert alone["losses"][-1] < alone["losses"][0] - 1e-3, "weights are updated"


def test_peer_that_is_not_installed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(zero_stages, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["zero_stages.py", "--peers", "deepspeed"])
    with pytest.raises(SystemExit):
        zero_stages.main()
    assert "pip install deepspeed==0.19.8" in capsys.readouterr().err


def test_contender_that_takes_too_long_is_ended_with_its_reason():
    outcome = train_speed.try_in_process("ours", TASK, limit=0.1)
    assert outcome == {"trials": [], "failed": "stopped after 0 s (--limit)"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "3", "--batch-rows", "4"], "--rows 3 does not divide --batch-rows 4"),
        (["--rows", "8", "--batch-rows", "4"], "--rows 8 does not divide --batch-rows 4"),
        (["--rows", "-1"], "greater than 0"),
        (["--ours", "hf_eager"], "only ours is profiled"),
        (["--ours", "hf_eager:compile=true"], "only ours and ours_plain take settings"),
        (["--ours", "theirs"], "theirs is not a contender"),
        (["--ours", "ours:seq_len=8"], "seq_len"),
        (["--steps", "0"], "--steps 0"),
    ],
)
def test_impossible_profile_is_refused_with_a_reason(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as ended:
        profile_step.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "fitting", "tried"),
    [
        ((4, 2, 1), 2, [(4, False), (2, True)]),
        ((1, 2, 4), 1, [(1, True), (2, False)]),
        ((2, 1), 0, [(2, False), (1, False)]),
    ],
)
def test_smaller_micro_batch_is_tried_only_after_memory_ran_out(monkeypatch, asked, fitting, tried):
    def limited(task: train_speed.Task, rows: int) -> train_speed.Step:
        if rows > fitting:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train_speed.ours(task, rows)

    monkeypatch.setitem(train_speed.CONTENDERS, "ours", train_speed.Contender(limited, ()))
    task = TASK.replace(workload=WORKLOAD.replace(micro_batch_rows=4), rows=asked)
    found = list(train_speed.measure("ours", task))
    assert [(figures["rows"], "failed" not in figures) for figures in found] == tried


def test_table_has_the_reasons_of_contenders_that_cannot_run_and_the_lead_over_the_fastest():
    [trial] = train_speed.measure("ours", TASK)
    best = trial | {"spread": 0.0, "tflops": 1.0}
    faster = best | {"tokens_per_second": 1.5 * best["tokens_per_second"]}
    outcomes = {
        "torchtitan": {"failed": "ImportError: cannot import name X"},
        "litgpt": {"absent": "not installed: litgpt (pip install litgpt)"},
        "hf_eager": {"failed": "out of memory at 2 rows"},
        "hf_compiled": {"best": best},
        "ours": {"best": faster},
        "liger": {},
    }
    runs = [
        {"size": "tiny", "contender": name, "version": ""} | facts
        for name, facts in outcomes.items()
    ]
    settings = {"sizes": ["tiny"], "precision": "fp32", "seq_len": 16, "vocab_size": 256}
    table = train_speed.report(
        {
            "device": DEVICE.model_dump() | {"peak_flops": None},
            "machine": {"torch": "2"},
            "settings": settings | {"batch_rows": 2, "rounds": 1, "windows": 1},
            "mfu": "",
            "matmul": [],
            "runs": runs,
        }
    )
    states = ["failed", "absent", "out of memory", "not measured yet"]
    names = ["torchtitan", "litgpt", "hf_eager", "liger"]
    for name, state in zip(names, states, strict=True):
        assert f"| tiny | {name} |  | - | {state} | - |" in table
    assert "tiny, torchtitan: ImportError: cannot import name X" in table
    assert "tiny: ours / hf_compiled, the fastest other trainer: 1.50" in table


def test_results_are_not_overwritten_without_a_measurement(monkeypatch, tmp_path):
    (tmp_path / "train_speed.json").write_text("of before")
    asked = ["--device", "cpu", "--contenders", "ours", "--limit", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_speed.py", *asked])
    with pytest.raises(SystemExit, match="nothing was measured"):
        train_speed.main()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["of before"]


def test_rows_are_doubled_up_to_the_batch():
    assert train_speed.doublings(48) == [3, 6, 12, 24, 48]


def test_profile_accounts_for_all_of_the_time():
    step = train_speed.ours(TASK, rows=2)
    kernels, span = profile_step.profile_steps(step, TASK, steps=1)
    figures = profile_step.summarise(kernels, span, steps=1, top=5)
    assert sum(figures["families"].values()) == pytest.approx(figures["busy_ms"])
    assert {"GEMM", "attention", "cross-entropy", "optimiser"} <= figures["families"].keys()
    assert "| GEMM |" in profile_step.report(figures | {"peak_gb": 1.0}, DEVICE, TASK)


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
def test_kernels_are_classified_by_name(kernel, family):
    assert profile_step.family(kernel) == family


@pytest.fixture
def trained(tmp_path) -> loss_curves.Work:
    """A few steps of tiny, of two micro-batches each."""
    return loss_curves.prepare(
        CorpusConfig(data_mode="synthetic"),
        tmp_path,
        DEVICE,
        "tiny",
        loss_curves.Task(vocab_size=300, context=32, rows=2, accumulate=2, seed=0),
        Schedule(name="cosine", peak=1e-3, warmup_steps=0, steps=6),
    )


@pytest.mark.slow
def test_all_variants_train_from_the_same_weights_and_rows(trained, quick_fp8):
    plain, fast, in_fp8 = (
        loss_curves.measure(way, trained)["losses"] for way in ("plain", "fast", "fp8")
    )
    assert len(plain) == 6 and plain[-1] < plain[0]
    assert plain != fast
    # the same sums in another order in fp32, which six steps of AdamW make larger
    assert fast == pytest.approx(plain, abs=1e-4)
    # a mean over 128 tokens whose losses fp8 moves by some hundredths, more from step to step
    assert in_fp8 != fast and in_fp8 == pytest.approx(plain, abs=0.05)


def test_plain_attention_equals_that_of_training():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    ours = loss_curves.llama.attend(q, k, v, None)
    # the same sums in another order, in fp32
    torch.testing.assert_close(loss_curves.attention(q, k, v, None), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_curves_are_printed_and_drawn_next_to_the_first(trained, tmp_path):
    settings = {"size": "tiny", "tokens_per_step": 128, "context": 32, "tf32": True}
    trained = trained._replace(tf32=True)
    [_, results] = loss_curves.compare(["plain", "fast", "fp8"], trained, DEVICE, settings)
    assert list(results["runs"]) == ["plain", "fast"]
    table = loss_curves.report(results)
    assert f"| plain | {results['runs']['plain']['losses'][0]:.4f} |" in table
    assert "fp8: --fp8 needs a GPU of compute capability 8.9" in table
    assert "fast: attention cudnn, feed_forward separate, loss chunks\nplain: products in" in table
    loss_curves.write(results, tmp_path / "out")
    assert (tmp_path / "out" / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        ValueError, match="fp8, the reference of the comparison, cannot run: --fp8 needs"
    ):
        next(loss_curves.compare(["fp8", "fast"], trained, DEVICE, settings))
    assert loss_curves.obstacle("fp8", trained, H100) is None


def test_start_on_a_simulated_set_reads_its_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(scale.part_counts, "PAGE_PARTS", 2)
    found = scale.measure(5, tmp_path, seq_len=64)
    assert found.parts == 4 and found.pages_bytes > 0 and found.slices_bytes > 0
    assert found.start_seconds > 0 and found.tokens > 0


def test_differences_are_those_of_smoothed_curves():
    low = [5.0 - step / 100 for step in range(100)]
    high = [loss + (0.5 if step >= 50 else 0.0) for step, loss in enumerate(low)]
    high[20] -= 0.1
    apart = loss_curves.differences({"low": {"losses": low}, "high": {"losses": high}})
    assert apart["low"] == {"mean": 0.0, "largest": 0.0, "at_step": 5}
    # windows of 5 steps: 96 of them, 46 above in full and 4 in part, 5 below by a fifth of 0.1
    assert apart["high"]["mean"] == pytest.approx((46 * 0.5 + 2 * 0.5 - 5 * 0.02) / 96)
    assert apart["high"]["largest"] == pytest.approx(0.5)
    assert apart["high"]["at_step"] >= 55


def test_phases_of_a_start_add_up_to_the_first_step():
    printed = [
        (4.0, "12:00:00  starting a Prefect server for this run on port 1"),
        (5.0, "Prefect UI: http://127.0.0.1:1"),
        (5.5, "tokenizer reused: cache/tokenizers/one"),
        (6.0, "running the pre-flight checks: the run has no earlier one"),
        (8.0, "pre-flight passed: 10 checks in 1.9 s"),
        (9.0, "step 0: validation loss 6.0; sample: ''"),
        (9.5, "step 1/4  loss 6.0"),
        (10.0, "wall time of training: 2 s"),
        (12.0, "overfit check passed: loss 0.1"),
        (13.0, "the process has ended"),
    ]
    lines = [startup.Line(seconds, 2 * seconds, text) for seconds, text in printed]
    found = startup.phases(lines)
    assert found.pop(startup.CPU) == 19.0
    assert list(found) == [phase.name for phase in startup.PHASES]
    assert sum(found.values()) == 13.0 and found["pre-flight"] == 2.0
    assert startup.until_first_step(found) == 9.5
    rest = startup.phases([line for line in lines if "Prefect" not in line.text])
    assert startup.until_first_step(rest) == 9.5, "without a server of its own"
