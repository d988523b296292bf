"""Speed of a run, from the best source: its own steps, earlier runs, or the device."""

from collections.abc import Sequence
from typing import NamedTuple

from zeroflow.device import Device, Load
from zeroflow.estimate import history
from zeroflow.estimate.history import SAME_MARGINS, Experience, Past
from zeroflow.estimate.speed import Rate, Speed, expected_speed, fastest_on_cpu
from zeroflow.run_folder import RunFolder
from zeroflow.training import goodput
from zeroflow.training.goodput import Account
from zeroflow.training.job import read_job
from zeroflow.training.workload import Workload
from zeroflow.units import count

_ENOUGH_RUNS = 3
"""Number of earlier runs that are enough to show how much other programs slow down a CPU."""


class PastTraining(NamedTuple):
    """The steps that a run has already trained."""

    workload: Workload
    time: Account


def already_trained(folder: RunFolder) -> PastTraining | None:
    """Return the steps that a run has trained; None if this version cannot read them."""
    try:
        return PastTraining(read_job(folder).training.workload, goodput.read(folder))
    except (OSError, ValueError):  # not trained yet, or trained by another version
        return None


def own_speed(trained: PastTraining | None, work: Workload, load: Load | None) -> Speed | None:
    """Return the speed of a run's own steps, if they were trained on the same devices."""
    if trained is None or not trained.workload.costs_as_much_as(work):
        return None
    time = trained.time
    if not time.steps or not time.training:
        return None
    rate = Rate.around([time.steps * work.batch_tokens / time.training], SAME_MARGINS[work.device])
    return Speed(_under(load, rate, work), f"as in {count(time.steps, 'step')} of this run")


def speed(
    work: Workload,
    device: Device,
    load: Load | None,
    known: Experience | None,
    runs: Sequence[Past],
) -> Speed:
    """Return the speed of a run that has no steps yet, from earlier runs or from the device.

    Args:
        load: other programs on the cores of a CPU; None on a GPU.
        known: figures of earlier runs of the same workload.
        runs: all earlier runs.
    """
    if known:
        return _with_load(known, work, device, load)
    if work.offload != "none":
        return Speed(None, "unknown until offloaded steps have been measured here; they are slower")
    alone = work.replace(ranks=1, nodes=1, zero_stage=0, shard_group=None, reshard_group=None)
    if work.ranks > 1 and (one := history.known(runs, alone)):
        found = _with_load(one, alone, device, load)
    else:
        found = expected_speed(alone, device, load)
    if found.rate is None or work.ranks == 1 or load:  # ranks on a CPU share its cores
        return found
    source = f"{found.source}, times {work.ranks}, not counting communication"
    return Speed(found.rate.times(work.ranks), source)


def _with_load(known: Experience, work: Workload, device: Device, load: Load | None) -> Speed:
    rate, source = _under(load, known.rate, work), known.source
    if load and known.runs < _ENOUGH_RUNS:
        now = expected_speed(work, device)
        assert now.rate is not None, "every CPU can be measured"
        rate = rate.replace(low=min(rate.low, now.rate.expected))
        source += f"; {now.source}"
    return Speed(rate, source)


def _under(load: Load | None, measured: Rate, work: Workload) -> Rate:
    """Widen a measured range on a CPU, which may be busier than before, or idle."""
    if load is None:
        return measured
    high = max(measured.high, fastest_on_cpu(work))
    return measured.replace(low=load.share * measured.low, high=high)
