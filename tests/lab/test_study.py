"""The laboratory's formulas are those of the engine that runs, on two processes."""

import os
from pathlib import Path

import pytest
import torch
from tiny import SHAPE, synthetic_rows, training_config, training_job

from zeroflow.device import find_device
from zeroflow.lab import collectives, fit
from zeroflow.lab.comparison import FEWEST_ROUNDS
from zeroflow.lab.measure import FitMeasurement
from zeroflow.lab.network import network
from zeroflow.lab.record import Amount, ZeroLab
from zeroflow.lab.study import LabConfig, Study, study
from zeroflow.lab.tensors import HOST_PARTS, PARTS
from zeroflow.model.llama import ModelConfig
from zeroflow.report import zero_lab
from zeroflow.run_folder import RunFolder
from zeroflow.training.job import TrainingJob

STEPS, RANKS, ACCUMULATE = 3, 2, 2
SHARDED = ("1", "2", "3")
CAP = 10**6
"""Bytes of a rank."""

# 75 rows cannot be divided among two ranks, so their shards are padded
MODEL = ModelConfig(**SHAPE.model_dump() | {"intermediate_size": 75}, vocab_size=300)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    folder: Path = tmp_path_factory.mktemp("lab")
    shards, tokenizer = synthetic_rows(folder)
    (folder / "runs").mkdir()
    training = training_config(steps=STEPS, model=MODEL, ranks=RANKS, accumulate=ACCUMULATE)
    return training_job(folder / "runs" / "lab", shards, tokenizer, training)


@pytest.fixture(scope="module")
def found(job: TrainingJob) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return study(job, LabConfig(), lambda event: None)


@pytest.fixture(scope="module")
def lab(found: Study) -> ZeroLab:
    assert [one.stage for one in found.lab.stages] == [0, 1, 2, 3]
    return found.lab


def test_number_and_bytes_of_all_collectives_are_as_predicted(lab):
    for one in lab.stages:
        for name, collective in one.collectives.items():
            assert collective.as_predicted, (one.stage, name, collective)


def test_stages_move_what_the_paper_says_and_what_accumulation_adds(lab):
    """Padding adds less than 1 %."""
    embedding = MODEL.embedding_parameters / MODEL.parameters
    blocks = 1 - embedding
    gathered_twice = ACCUMULATE * (2 * blocks + embedding)
    expected = [2, 2, 1 + ACCUMULATE, gathered_twice + ACCUMULATE]
    assert [lab.volume(one) for one in lab.stages] == pytest.approx(expected, rel=0.01)


def test_memory_is_predicted_within_three_percent_in_every_part(lab):
    for one in lab.stages:
        assert set(one.memory) == {*PARTS, "peak"}
        for part, amount in one.memory.items():
            assert abs(amount.error) < 0.03, (one.stage, part, amount)


def test_stages_shard_what_the_paper_says(lab):
    whole = 4 * lab.parameters
    parts = {one.name: {p: a.measured for p, a in one.memory.items()} for one in lab.stages}
    assert parts["0"]["parameters"] == whole
    for stage in SHARDED:
        assert parts[stage]["parameters"] == pytest.approx(whole / RANKS, rel=0.01)
        assert parts[stage]["moments"] == pytest.approx(2 * whole / RANKS, rel=0.01)
    assert parts["1"]["gradients"] > max(whole, parts["2"]["gradients"])
    assert parts["2"]["gradients"] > whole / RANKS
    assert parts["3"]["gathered"] < parts["2"]["gathered"]


@pytest.mark.slow
def test_offload_changes_nothing_if_device_and_host_are_the_same_memory(job):
    found = study(job, LabConfig(offload="optimizer"), lambda event: None)
    names = ["0", *SHARDED, *(f"{stage}, offloaded" for stage in SHARDED)]
    assert [one.name for one in found.lab.stages] == names
    assert found.lab.agrees
    on_device, offloaded = found.lab.stages[1:4], found.lab.stages[4:]
    for without, one in zip(on_device, offloaded, strict=True):
        assert one.offload == "optimizer" and one.host is None
        assert (one.memory, one.collectives) == (without.memory, without.collectives)
    losses = [measured.losses for measured in found.measurements]
    assert losses[4:] == losses[1:4]
    page = zero_lab.write(job, found).linked
    rows = len(offloaded[-1].collectives) + 1
    assert page.count("| 3, offloaded |") == rows, "collectives and volume, not the paper's memory"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_steps_over_slow_links_are_measured_and_predicted(job):
    try:
        with network(RANKS):
            pass
    except ValueError as error:
        pytest.skip(str(error))
    schedule = job.training.schedule.replace(steps=FEWEST_ROUNDS)
    rounds = job.replace(training=job.training.replace(schedule=schedule))
    bandwidths = (0.005, 0.01)  # so slow that a busy machine sends as fast
    result = study(rounds, LabConfig(zero_stages=(0, 2), bandwidth_gbps=bandwidths), print)
    found = result.lab.slow_links
    assert found is not None and found.compared_gbps == bandwidths[::-1]
    assert [link.gbps for link in found.links] == [None, *found.compared_gbps]
    work = job.training.workload
    for link in found.links[1:]:
        assert link.gbps is not None
        for one in link.stages:
            calls = collectives.calls(work.replace(zero_stage=one.stage)).items()
            sent = sum(times * collectives.sent_bytes(*c, RANKS, "cpu") for c, times in calls)
            assert one.step_seconds is not None
            # A link may send a burst after each pause, and there are fewer pauses than calls
            burst = 2**15 * sum(times for _, times in calls)
            assert one.step_seconds > 8 * (sent - burst) / link.gbps / 1e9
    [pair] = found.pairs
    assert pair.measured is not None and (pair.stage, pair.other) == (0, 2)
    assert pair.measured.on_slowest.sign == pair.predicted.on_slowest.sign == 1, (
        "stage 2 sends more"
    )
    page = zero_lab.write(rounds, result).linked
    assert "Over slow links" in page and "(zero-bandwidth.png)" in page


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


@pytest.mark.gpu
@TWO_GPUS
def test_steps_over_slow_links_are_predicted_on_two_gpus(tmp_path):
    shards, tokenizer = synthetic_rows(tmp_path)
    (tmp_path / "runs").mkdir()
    settings = {"ranks": RANKS, "accumulate": ACCUMULATE, "precision": "bf16"}
    training = training_config(steps=8, model=MODEL, device="cuda", **settings)
    job = training_job(tmp_path / "runs" / "lab", shards, tokenizer, training)
    config = LabConfig(zero_stages=(0, 2), bandwidth_gbps=(0.1, 0.2))
    found = study(job, config, lambda event: None).lab.slow_links
    assert found is not None and found.own_gbps > 0.4 and len(found.pairs) == 1
    for one, two in zip(*(link.stages for link in found.links[1:]), strict=True):
        assert one.step_seconds is None
        assert two.predicted_step_seconds > one.predicted_step_seconds, "0.1 is slower than 0.2"


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize(
    ("precision", "accumulate"), [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
)
def test_offloaded_state_is_in_host_memory_on_two_gpus(tmp_path, precision, accumulate):
    shards, tokenizer = synthetic_rows(tmp_path)
    (tmp_path / "runs").mkdir()
    settings = {"ranks": RANKS, "accumulate": accumulate, "precision": precision}
    training = training_config(steps=STEPS, model=MODEL, device="cuda", **settings)
    job = training_job(tmp_path / "runs" / "lab", shards, tokenizer, training)
    config = LabConfig(zero_stages=(1, 2, 3), offload="optimizer")
    lab = study(job, config, lambda event: None).lab
    assert lab.agrees
    wrong = []
    for one in lab.stages[3:]:
        assert one.host is not None
        assert one.memory["parameters"].measured == one.memory["moments"].measured == 0
        assert all(collective.as_predicted for collective in one.collectives.values())
        for place in (one.memory, one.host):
            for part, amount in place.items():
                if abs(amount.error) > 0.03:
                    wrong.append((one.name, "host" if place is one.host else "GPU", part, amount))
    assert not wrong


def test_losses_are_those_of_one_rank_up_to_rounding(found, lab):
    assert len(found.one_rank.losses) == STEPS
    assert lab.agrees and lab.tolerance < 1e-5
    assert all(one.max_loss_difference <= 1e-6 for one in lab.stages)


def test_speed_and_time_lines_are_measured(found, lab):
    for one, measured in zip(lab.stages, found.measurements, strict=True):
        assert one.tokens_per_second == pytest.approx(lab.tokens_per_step / one.step_seconds)
        assert 0 < one.exposed_seconds <= one.communication_seconds
        lanes = {span.lane for span in measured.spans}
        assert lanes >= {"forward", "backward", "optimizer", "reduce"}
        assert ("gather" in lanes) == (one.stage > 0)


def test_page_and_plots_show_the_record(job, found, lab):
    page = zero_lab.write(job, found).linked
    folder = RunFolder(job.run_dir)
    assert ZeroLab.read(folder.zero_lab) == lab
    assert "number and bytes as predicted" in page and "**" not in page
    for plot in folder.path.glob("*.png"):
        assert f"({plot.name})" in page and plot.read_bytes().startswith(b"\x89PNG")
    assert len([*folder.path.glob("*.png")]) == 4


def test_page_shows_offloaded_state_in_host_memory_by_part(job, lab):
    assert "Offloaded state" not in zero_lab.page(job, lab).linked
    *others, last = lab.stages
    host = dict.fromkeys(HOST_PARTS, Amount(predicted=3 * 2**20, measured=2 * 2**20))
    page = zero_lab.page(job, lab.replace(stages=(*others, last.replace(host=host)))).linked
    assert "predicted within 50.0 % in every part" in page
    table = page[page.index("Offloaded state") :]
    assert [line for line in table.splitlines() if "(+50.0 %)" in line] == [
        f"| {part} | 2.00 (+50.0 %) |" for part in HOST_PARTS
    ]


def test_page_shows_what_fits_and_what_was_predicted_wrongly(job, lab):
    sizes = fit.largest(job.training.workload, find_device("cpu"), CAP)
    peaks = [
        FitMeasurement(peak=CAP, peak_above=CAP + 1, step_seconds=1),
        FitMeasurement(peak=CAP, peak_above=CAP, step_seconds=1),
    ]
    found = lab.replace(fit=fit.record([sizes], peaks, find_device("cpu"), CAP))
    assert ZeroLab.model_validate_json(found.model_dump_json()) == found
    page = zero_lab.page(job, found).linked
    assert "may take 1.0 MB" in page
    assert page.count("not the largest") == 1, "a model with one more block would have fitted"


@pytest.mark.slow
def test_largest_micro_batch_and_model_fit_under_the_cap_and_larger_ones_do_not(job):
    config = LabConfig(zero_stages=(0, 3), memory_gb=CAP / 1e9)
    found = study(job, config, lambda event: None).lab.fit
    assert found is not None and found.cap_bytes == CAP
    for stage in found.stages:
        for one in (stage.micro_batch, stage.model):
            assert one is not None and one.is_largest(CAP), (stage.stage, one)
            assert abs(one.peak.error) < 0.03 and abs(one.peak_above.error) < 0.03
            assert one.tokens_per_second > 0


def test_a_study_whose_losses_differ_by_more_than_rounding_does_not_agree(lab):
    first, *others = lab.stages
    wrong = first.replace(max_loss_difference=2 * lab.tolerance)
    assert not lab.replace(stages=(wrong, *others)).agrees


def test_a_stage_that_is_listed_twice_is_refused():
    with pytest.raises(ValueError, match="--zero-stages lists a value twice: 1, 1"):
        LabConfig(zero_stages=(1, 1))
