"""Speed over slow links: the network of the ranks, and the prediction of crossovers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import WORKLOAD

from zeroflow.lab import collectives
from zeroflow.lab.links import LinkMeasurement, SingleCollective, interquartile_mean
from zeroflow.lab.network import network
from zeroflow.lab.prediction import crossovers, linked

LATENCY = 1e-4
WORK = [WORKLOAD.replace(ranks=2, zero_stage=stage) for stage in (0, 3)]
SIZES = sorted({call for work in WORK for call in collectives.calls(work)})
COMPUTATION = (0.020, 0.010)
"""Seconds of stages 0 and 3 without collectives: stage 3 updates half of the weights."""


def seconds(size: int, gbps: float | None) -> float:
    return LATENCY + (0.0 if gbps is None else 8 * size / (gbps * 1e9))


def communication(number: int, gbps: float | None) -> float:
    calls = collectives.calls(WORK[number])
    return sum(times * seconds(size, gbps) for (_, size), times in calls.items())


def measured(gbps: float | None) -> LinkMeasurement:
    return LinkMeasurement(
        gbps=gbps,
        step_seconds=tuple(COMPUTATION[n] + communication(n, gbps) for n in range(2)),
        collectives=tuple(
            SingleCollective(name=name, bytes=size, seconds=seconds(size, gbps))
            for name, size in SIZES
        ),
    )


BANDWIDTHS = (None, 1.0, 0.5, 0.1, 0.05, 0.02)


def test_times_that_collectives_explain_are_predicted_exactly():
    links = linked([measured(gbps) for gbps in BANDWIDTHS], WORK)
    assert [link.gbps for link in links] == [*BANDWIDTHS]
    for link in links:
        for one in link.stages:
            assert one.predicted_step_seconds == pytest.approx(one.step_seconds)


def test_crossover_is_where_the_times_are_equal():
    [crossing] = crossovers(linked([measured(gbps) for gbps in BANDWIDTHS], WORK))
    assert (crossing.slow_link, crossing.fast_link) == (0, 3)
    at = crossing.gbps
    assert at is not None and crossing.predicted_gbps == pytest.approx(at)
    times = [COMPUTATION[n] + communication(n, at) for n in range(2)]
    assert times[0] == pytest.approx(times[1])
    assert 0.02 < at < 1.0


def test_times_that_cross_several_times_have_no_crossover():
    noisy = [measured(gbps) for gbps in BANDWIDTHS]
    swapped = noisy[-1].replace(step_seconds=noisy[-1].step_seconds[::-1])
    [crossing] = crossovers(linked([*noisy[:-1], swapped], WORK))
    assert crossing.gbps is None and crossing.predicted_gbps is not None


def test_stages_that_differ_by_noise_and_only_without_a_limit_have_no_crossover():
    def crossing(*ratios: float) -> object:
        """Return the crossover for these times of the second stage, relative to the first."""
        found = [
            measured(gbps).replace(step_seconds=(1.0, ratio))
            for gbps, ratio in zip((None, 10.0, 1.0, 0.1), ratios, strict=True)
        ]
        return next((one.gbps for one in crossovers(linked(found, WORK)) if one.gbps), None)

    assert crossing(0.9, 0.9, 1.0001, 1.1)
    assert not crossing(0.9, 0.99, 1.0001, 1.1), "1 % is noise"
    assert not crossing(0.9, 1.1, 1.2, 1.3), "the bandwidth without a limit is unknown"


def test_mean_of_the_middle_half_ignores_disturbed_steps():
    assert interquartile_mean([1.0]) == 1.0
    assert interquartile_mean([9.0, 1.0, 2.0, 3.0, 0.0, 2.0, 100.0, 1.0]) == pytest.approx(2.0)


def test_network_without_root_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/sbin/{tool}")
    with pytest.raises(ValueError, match=r"--bandwidth-gbps .* needs root: run the command as"):
        network(2).__enter__()


SEND = """
import os, sys, time
import torch
import torch.distributed as dist
from zeroflow.lab import network
rank, file, joined = int(sys.argv[1]), sys.argv[2], sys.argv[3]
network.enter(network.Network.model_validate_json(joined), rank)
dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
whole = torch.zeros(2**20)  # 4 MiB
for gbps in (None, 0.2):
    network.limit(gbps)
    dist.all_reduce(whole)
    before, began = network.sent_bytes(), time.perf_counter()
    dist.all_reduce(whole)
    print(time.perf_counter() - began, network.sent_bytes() - before)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_limited_rank_sends_no_faster_than_its_limit(tmp_path):
    try:
        with network(2) as joined:
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
        (_, free), (seconds, sent) = (map(float, line.split()) for line in output.splitlines())
        assert 2**22 < free < 1.1 * 2**22, "an all-reduce of two ranks sends its buffer once"
        assert sent == pytest.approx(free, rel=0.05)
        assert seconds > 0.9 * 8 * sent / 0.2e9
    assert not [name for name in joined.namespaces if Path("/run/netns", name).exists()]
