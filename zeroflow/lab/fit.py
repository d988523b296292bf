"""The largest micro-batch and the largest model that fit under a cap on the memory of a rank.

The models differ only in the number of blocks. A formula chooses the sizes. Ranks then measure a
step at each size, and with one more row or block, which should exceed the cap.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

from zeroflow.device import Device
from zeroflow.estimate import memory as plan
from zeroflow.lab import memory
from zeroflow.lab.measure import Fit, FitMeasurement
from zeroflow.lab.record import Amount, Largest, MemoryFit, StageFit
from zeroflow.training.workload import Workload

Resized = Callable[[int], Workload]
"""Returns a workload with a number of rows in a micro-batch, or of blocks in the model."""


class StageSizes(NamedTuple):
    """The largest sizes of a stage under the cap; None if not even one row or block fits."""

    work: Workload
    rows: Fit | None
    blocks: Fit | None

    @property
    def fits(self) -> tuple[Fit, ...]:
        return tuple(fit for fit in (self.rows, self.blocks) if fit)


def largest(work: Workload, device: Device, cap: int) -> StageSizes:
    """Return the largest sizes with which a step of `work` takes at most `cap` bytes.

    The number of micro-batches in a step stays the same.
    """
    return StageSizes(
        work,
        rows=_largest(partial(_with_rows, work), device, cap),
        blocks=_largest(partial(_with_blocks, work), device, cap),
    )


def _largest(resized: Resized, device: Device, cap: int) -> Fit | None:
    def exceeds(size: int) -> bool:
        return predicted_peak(resized(size), device) > cap

    # Memory grows with the size, so a few sizes are enough to find the limit
    too_large = next(size for size in (2**power for power in count()) if exceeds(size))
    size = bisect_left(range(1, too_large), True, key=exceeds)
    return Fit(workload=resized(size), above=resized(size + 1)) if size else None


def _with_rows(work: Workload, rows: int) -> Workload:
    return work.replace(micro_batch_rows=rows)


def _with_blocks(work: Workload, blocks: int) -> Workload:
    return work.replace(model=work.model.replace(num_hidden_layers=blocks))


def predicted_peak(work: Workload, device: Device) -> int:
    """Return the predicted bytes of a rank's tensors at the peak of a step.

    On a GPU the plan predicts it. On a CPU the plan predicts the memory of the process instead, to
    which a cap on tensors does not apply, so the laboratory's own formula is used.
    """
    if device.kind == "cuda":
        return plan.memory(work, device).total
    return memory.predicted(work.replace(compile=False))["peak"]


def record(
    stages: Sequence[StageSizes], measured: Iterable[FitMeasurement], device: Device, cap: int
) -> MemoryFit:
    """Return the record of the sizes.

    Args:
        measured: measurements of the `fits` of all stages, in their order.
    """
    remaining = iter(measured)

    def with_figures(fit: Fit | None) -> Largest | None:
        return None if fit is None else _with_figures(fit, next(remaining), device)

    return MemoryFit(
        cap_bytes=cap,
        stages=tuple(
            StageFit(
                stage=one.work.zero_stage,
                shard_group=one.work.shard_group,
                offload=one.work.offload,
                micro_batch=with_figures(one.rows),
                model=with_figures(one.blocks),
            )
            for one in stages
        ),
    )


def _with_figures(fit: Fit, measured: FitMeasurement, device: Device) -> Largest:
    work = fit.workload
    return Largest(
        micro_batch_rows=work.micro_batch_rows,
        blocks=work.model.num_hidden_layers,
        parameters=work.model.parameters,
        peak=Amount(predicted=predicted_peak(work, device), measured=measured.peak),
        peak_above=Amount(
            predicted=predicted_peak(fit.above, device), measured=measured.peak_above
        ),
        tokens_per_second=work.batch_tokens / measured.step_seconds,
    )
