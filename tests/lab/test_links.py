"""Steps over slow links: the network of the ranks, the model, and the comparison of stages."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORKLOAD

from zeroflow.lab import collectives, comparison, network
from zeroflow.lab.collectives import GATHER, SCALARS, SCATTER, SUM
from zeroflow.lab.links import LinkMeasurement, SingleCollective, middle_mean
from zeroflow.lab.prediction import LinkModel, StageSteps, slow_links
from zeroflow.lab.record import SlowLinks, StageDifference
from zeroflow.lab.timeline import Span
from zeroflow.report import zero_links, zero_plots
from zeroflow.run_folder import RunFolder

LATENCY, OWN_GBPS, SMALL = 1e-4, 8.0, 8
WORK = [WORKLOAD.replace(ranks=2, zero_stage=stage) for stage in (0, 3)]
CALLS = sorted({call for work in WORK for call in collectives.calls(work)})
COMPUTATION = (0.020, 0.010)
"""Seconds of stages 0 and 3 without collectives: stage 3 updates half of the weights."""

BANDWIDTHS = (4.0, 1.0, 0.5, 0.1, 0.05, 0.02)


def seconds(name: str, size: int, gbps: float | None, device: str = "cpu") -> float:
    """Return the time of a collective of two ranks."""
    if name == SCALARS or size == SMALL:
        return LATENCY
    twice = 2 if name == SUM or (name == SCATTER and device == "cpu") else 1
    headers = 1514 / 1448 if device == "cpu" else 1
    return LATENCY + headers * 8 * twice * size / 2 / (gbps or OWN_GBPS) / 1e9


def singles(device: str = "cpu") -> list[SingleCollective]:
    calls = [*CALLS, *((name, SMALL) for name in (GATHER, SCATTER, SUM))]
    return [
        SingleCollective(name=name, bytes=size, seconds=seconds(name, size, None, device))
        for name, size in calls
    ]


def step(number: int, gbps: float | None, device: str = "cpu") -> float:
    """Return the time of a step of stage 0 or 3."""
    calls = collectives.calls(WORK[number]).items()
    sent = sum(times * seconds(*call, gbps, device) for call, times in calls)
    return COMPUTATION[number] + sent


def span(lane: str, begin: float, end: float) -> Span:
    return Span.model_validate({"lane": lane, "begin": begin, "end": end})


def stages(noise: tuple[float, ...] = (0.0,) * 6, device: str = "cpu") -> list[StageSteps]:
    """Return steps without a limit, in which nothing hides the collectives."""
    blocking = [span("forward", 0, 1), span("gather", 1, 2), span("reduce", 2, 3)]
    return [
        StageSteps(
            work.replace(device=device),
            [step(number, None, device) + off for off in noise],
            blocking if work.zero_stage else [*blocking[:1], *blocking[2:]],
        )
        for number, work in enumerate(WORK)
    ]


def measured(noise: tuple[float, ...] = (0.0,) * 6) -> list[LinkMeasurement]:
    return [
        LinkMeasurement(
            gbps=gbps,
            step_seconds=tuple(tuple(step(n, gbps) + off for off in noise) for n in range(2)),
        )
        for gbps in BANDWIDTHS
    ]


def equal_at(device: str = "cpu") -> float:
    """Return the bandwidth at which the times of both stages are equal, by bisection."""
    low, high = 0.02, 4.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        slower = step(1, middle, device) > step(0, middle, device)
        low, high = (middle, high) if slower else (low, middle)
    return low


def test_times_that_collectives_explain_are_predicted_exactly():
    found = slow_links(singles(), stages(), BANDWIDTHS, measured())
    assert found.own_gbps == pytest.approx(OWN_GBPS)
    assert [link.gbps for link in found.links] == [None, *BANDWIDTHS]
    assert found.errors == pytest.approx([0.0] * 2 * len(BANDWIDTHS))


def test_links_of_gpus_are_predicted_without_measured_steps():
    found = slow_links(singles("cuda"), stages(device="cuda"), BANDWIDTHS)
    times = [(link.gbps, one) for link in found.links for one in link.stages]
    for (gbps, one), number in zip(times, (0, 1) * len(found.links), strict=True):
        assert one.step_seconds is None
        assert one.predicted_step_seconds == pytest.approx(step(number, gbps, "cuda"))
    [pair] = found.pairs
    assert pair.measured is None and pair.predicted.crossover_gbps is not None
    assert pair.predicted.crossover_gbps.value == pytest.approx(equal_at("cuda"))


def test_collectives_are_no_faster_than_they_were_measured():
    model = LinkModel(singles(), 2, "cpu")
    for name, size in ((name, size) for name, size in CALLS if name != SCALARS):
        assert model.call_seconds(name, size, 100.0) == seconds(name, size, None)
        assert model.call_seconds(name, size, 0.1) == pytest.approx(seconds(name, size, 0.1))


def test_ring_sends_each_shard_to_all_other_ranks():
    for ranks, device in product((2, 4), ("cpu", "cuda")):
        sent = {
            name: collectives.sent_bytes(name, 4000, ranks, device)
            for name in (GATHER, SCATTER, SUM)
        }
        others = 4000 * (ranks - 1) / ranks
        scattered = 2 * others if device == "cpu" else others
        assert sent == {GATHER: others, SCATTER: scattered, SUM: 2 * others}


def test_crossover_is_where_the_times_are_equal_and_noise_of_a_round_cancels():
    noise = (0.0, 1.0, 5.0, -0.01, 0.3, 2.0)  # of both stages, up to 100 times the difference
    found = slow_links(singles(), stages(noise), BANDWIDTHS, measured(noise))
    [pair] = found.pairs
    assert (pair.stage, pair.other) == (0, 3) and pair.measured is not None
    for line in (pair.measured, pair.predicted):
        assert line.crossover_gbps is not None
        assert line.crossover_gbps.value == pytest.approx(equal_at())
        assert (line.on_slowest.sign, line.on_fastest.sign) == (1, -1)


def test_bandwidths_near_that_of_the_link_are_not_compared():
    found = slow_links(singles(), stages(), (6.0, *BANDWIDTHS), ())
    assert found.compared_gbps == BANDWIDTHS, "6 is more than half of 8"
    assert slow_links(singles(), stages(), (6.0, 1.0)).pairs == ()
    assert slow_links(singles(), stages((0.0,) * 4), BANDWIDTHS).pairs == (), "too few steps"


GBPS = (0.25, 0.5, 1.0, 2.0, 4.0)


def line(
    start: float, slope: float, rounds: int = 20, noise: float = 0.0, seed: int = 0
) -> StageDifference:
    """Return the difference of stages that is `start` + `slope`/bandwidth, with heavy tails."""
    x = 1 / np.array(GBPS)
    duration = 0.2 + x
    tails = np.random.default_rng(seed).standard_t(3, size=(rounds, len(GBPS)))
    off = noise * np.sqrt(duration) * tails
    return comparison.difference((start + slope * x + off).tolist(), GBPS, duration.tolist())


def test_line_through_differences_without_noise_is_exact():
    found = line(-0.02, 0.016)
    assert found.computed_seconds.value == pytest.approx(-0.02)
    assert found.moved_bytes.value == pytest.approx(0.016 * 1e9 / 8)
    crossover = found.crossover_gbps
    assert crossover is not None
    assert [crossover.low, crossover.value, crossover.high] == pytest.approx([0.8] * 3)


def test_crossover_outside_the_bandwidths_is_not_reported():
    for start, slope in ((-0.02, 0.16), (-0.02, 0.002), (0.02, 0.016)):
        found = line(start, slope)
        assert found.crossover_gbps is None
        assert found.on_slowest.sign == found.on_fastest.sign != 0


def test_interval_has_the_true_crossover_and_noise_alone_has_none():
    true, found, of_noise = 1.25, [], 0
    for seed in range(60):
        if crossover := line(-0.016, 0.02, noise=0.01, seed=seed).crossover_gbps:
            found.append(crossover.low <= true <= crossover.high)
        of_noise += line(0.0, 0.0, noise=0.01, seed=seed).crossover_gbps is not None
    assert len(found) > 50
    # 95 % of the intervals should have it; of 60, fewer than 85 % do by chance once in 1,000 times
    assert np.mean(found) > 0.85
    assert of_noise <= 3


def test_mean_of_the_middle_half_ignores_disturbed_steps():
    assert middle_mean([1.0]) == 1.0
    assert middle_mean([9.0, 1.0, 2.0, 3.0, 0.0, 2.0, 100.0, 1.0]) == pytest.approx(2.0)


def page(found: SlowLinks, folder: RunFolder) -> str:
    zero_plots.bandwidth(found, 2, folder.zero_bandwidth_plot)
    assert folder.zero_bandwidth_plot.read_bytes().startswith(b"\x89PNG")
    return "\n".join(map(str, zero_links.parts(found, folder)))


def test_page_shows_measured_and_predicted_lines_of_each_pair(tmp_path):
    folder = RunFolder(tmp_path)
    both = page(slow_links(singles(), stages(), BANDWIDTHS, measured()), folder)
    assert "error of the model is 0.0 % on average" in both
    assert "('0 and 3', 'measured'" in both and "('', 'predicted'" in both
    assert both.count("stage 0 below, stage 3 above") == 2
    predicted = page(slow_links(singles("cuda"), stages(device="cuda"), BANDWIDTHS), folder)
    assert "predicted and not measured" in predicted and "'measured'" not in predicted
    few = page(slow_links(singles(), stages(), (6.0, 1.0)), folder)
    assert "not compared: this needs five steps, and two bandwidths of at most" in few
    assert zero_links.parts(None, folder) == ()


def test_network_without_root_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/sbin/{tool}")
    with pytest.raises(ValueError, match=r"--bandwidth-gbps .* needs root: run the command as"):
        network.network(2).__enter__()


SEND = """
import os, sys, time
import torch.distributed as dist
from zeroflow.lab import links, network
from zeroflow.lab.collectives import GATHER, SCATTER, SUM
rank, file, joined = int(sys.argv[1]), sys.argv[2], sys.argv[3]
network.enter(network.Network.model_validate_json(joined), rank)
dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
for gbps in (None, 0.2):
    network.limit(gbps)
    for name in (GATHER, SCATTER, SUM):
        call = links._collective(name, 2**22, "cpu")
        call()
        dist.barrier()
        before, began = network.sent_bytes(), time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        dist.barrier()  # all has been sent
        print(name, seconds, network.sent_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_ranks_send_the_bytes_of_the_model_no_faster_than_the_limit(tmp_path):
    try:
        with network.network(2) as joined:
            words = [sys.executable, "-c", SEND]
            ranks = [
                subprocess.Popen(
                    [*words, str(rank), str(tmp_path / "file"), joined.model_dump_json()],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for rank in range(2)
            ]
            said = [rank.communicate(timeout=300)[0] for rank in ranks]
    except ValueError as error:
        pytest.skip(str(error))
    for output in said:
        lines = [line.split() for line in output.splitlines()]
        for name, _, sent in lines:
            # Headers of packets and two barriers
            expected = collectives.sent_bytes(name, 2**22, 2, "cpu")
            assert float(sent) == pytest.approx(expected, rel=0.05), name
        for name, taken, _ in lines[3:]:
            if name != GATHER:  # whose last bytes may still be in the buffer of the sender
                bits = 8 * collectives.sent_bytes(name, 2**22, 2, "cpu")
                assert float(taken) > 0.9 * bits / 0.2e9, name
    assert not [name for name in joined.namespaces if Path("/run/netns", name).exists()]


ON_ONE_GPU = """
import torch.distributed as dist
from zeroflow.lab import links
from zeroflow.lab.collectives import GATHER, SCALARS, SCATTER, SUM
settings = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("cpu:gloo,cuda:nccl", **settings)
for name in (GATHER, SCATTER, SUM, SCALARS):
    print(links._single(name, 2**20, "cuda"))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_single_collectives_of_a_gpu_are_timed():
    said = subprocess.run(
        [sys.executable, "-c", ON_ONE_GPU], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    times = [float(line) for line in said.splitlines()]
    assert len(times) == 4 and all(0 < seconds < 1 for seconds in times)
