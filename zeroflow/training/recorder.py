"""TODO docstring."""

import logging
import math
import shlex
import time
from pathlib import Path

import torch

from zeroflow import records
from zeroflow.training import zero
from zeroflow.training.goodput import Account, PhaseLedger
from zeroflow.training.health import Monitor, Reading
from zeroflow.training.job import TrainingJob
from zeroflow.training.loop import StepMetrics
from zeroflow.training.state import TrainState
from zeroflow.training.validation import bits_per_byte

log = logging.getLogger("zeroflow.training")


class Recorder:
    """Writes what happens to metrics.jsonl and events.jsonl, which the parent follows.

    Rank 0 does. The others take part where figures are of all ranks, and write nothing.
    """

    def __init__(self, job: TrainingJob, books: PhaseLedger, *, step: int, context: int) -> None:
        self._job, self._books, self._context = job, books, context
        self._rows_per_step = job.training.workload.batch_rows
        self._tokens_per_step = self._rows_per_step * context
        self._metrics, self._events = job.folder.metrics, job.folder.events
        # What a killed process logged after its last checkpoint comes again
        zero.on_rank0(lambda: records.keep(self._metrics, lambda line: 0 < step >= line["step"]))
        self._last = (books.account.steps, books.account.training)
        earlier = [_reading(line) for line in self.lines() if "update_ratio" in line]
        self._monitor = Monitor(entropy=job.shards.entropy, earlier=earlier)

    def tokens(self, step: int) -> int:
        return step * self._tokens_per_step

    def flops(self, step: int) -> int:
        return self.tokens(step) * self._job.model.flops_per_token(self._context)

    def event(self, name: str, **facts: object) -> None:
        if zero.rank() == 0:
            records.append(self._events, {"event": name, "time": time.time(), **facts})

    def alive(self) -> None:
        if zero.rank() == 0:
            self._job.folder.alive.touch()

    def step(self, state: TrainState, metrics: StepMetrics) -> list[str]:
        """Log the step just done; reading its loss waits for the device.

        Returns:
            what is unusual about the step, in words
        """
        step, loss, grad_norm = state.step, metrics.loss.item(), metrics.grad_norm.item()
        account = self._books.book(step)
        rate = self._rate(account)
        skipped = int(state.skipped[1])
        if not math.isfinite(loss + grad_norm):
            if zero.rank() == 0:
                log.warning("step %d: loss %s, gradient norm %s: no update", step, loss, grad_norm)
            self.event("skipped", step=step, skipped=skipped)
            return []
        optimizer = self._job.training.workload.optimizer
        line = {
            "step": step,
            "tokens": self.tokens(step),
            "flops": self.flops(step),
            "loss": loss,
            "lr": metrics.learning_rate,
            "grad_norm": grad_norm,
            "update_ratio": optimizer.update_ratio(state.optimizer).item(),
            "skipped_updates": skipped,
            "first_epoch": step * self._rows_per_step <= self._job.shards.train.rows,
            "tokens_per_second": rate,
            "peak_memory_mib": peak_memory_bytes(self._job) / 2**20,
            "goodput": account.shares,
        }
        if (mfu := self.mfu(rate)) is not None:
            line["mfu"] = mfu
        self._record(line)
        alarms = zero.on_rank0(lambda: self._monitor.alarms(_reading(line)))
        if zero.rank() > 0:
            return alarms
        for alarm in alarms:
            log.warning("step %d: %s", step, alarm)
        if alarms:
            log.warning(
                "its documents: zeroflow documents --run %s --step %d --cache-dir %s",
                *(self._job.folder.name, step, shlex.quote(str(self._job.folder.cache.path))),
            )
            self.event("spike", step=step, alarms=alarms)
        return alarms

    def validation(self, step: int, loss: float, sample: str) -> None:
        bytes_per_token = self._job.shards.validation_bytes_per_token
        bpb = bits_per_byte(loss, bytes_per_token) if bytes_per_token else None
        line: records.Line = {"step": step, "tokens": self.tokens(step), "flops": self.flops(step)}
        line |= {"val_loss": loss, "val_bpb": bpb}
        self._record(line | {"sample": sample})

    def tokens_per_second(self, steps: int, seconds: float) -> float | None:
        """None where a process has done its first step only, which says nothing."""
        return self.tokens(steps) / seconds if steps else None

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOPs utilisation: https://arxiv.org/abs/2204.02311, appendix B."""
        if self._job.peak_flops is None or tokens_per_second is None:
            return None
        flops = self._job.model.flops_per_token(self._context)
        return tokens_per_second * flops / self._job.peak_flops

    def lines(self) -> list[records.Line]:
        return records.read(self._metrics)

    def _record(self, line: records.Line) -> None:
        if zero.rank() == 0:
            line["time"] = time.time()
            records.append(self._metrics, line)
            self.event("metrics", **line)

    def _rate(self, account: Account) -> float | None:
        """Since the last time."""
        steps, seconds = self._last
        self._last = (account.steps, account.training)
        return self.tokens_per_second(account.steps - steps, account.training - seconds)


def _reading(line: records.Line) -> Reading:
    return Reading(**{name: line[name] for name in Reading._fields})


def peak_memory_bytes(job: TrainingJob) -> int:
    """Most that a rank has held so far: of the GPU by tensors, of a CPU process as resident set."""
    return zero.max_over_ranks(_peak_memory_bytes(job))


def _peak_memory_bytes(job: TrainingJob) -> int:
    if job.training.workload.device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage, whose figure Linux starts at the memory of the process that started this
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except FileNotFoundError:  # not Linux
        import resource  # not on Windows, where a GPU would be

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
