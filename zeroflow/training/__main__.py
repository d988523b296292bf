"""The program that trains: `-m zeroflow.training JOB.json`."""

import gc
import logging
import math
import os
import shlex
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from zeroflow import artifacts, generate
from zeroflow.data.batches import Ahead, Batches
from zeroflow.data.shards import Rows
from zeroflow.training import checkpoint, compiling, events, goodput, worker, zero
from zeroflow.training.checkpoint import Saver
from zeroflow.training.goodput import Account, Books, Clock
from zeroflow.training.health import Monitor, Reading
from zeroflow.training.job import LAUNCHED, RESULT, TrainingJob, TrainResult
from zeroflow.training.loop import StepMetrics, TrainState, new_state, train
from zeroflow.training.optimizer import update_ratio
from zeroflow.training.validation import bits_per_byte, validation_loss
from zeroflow.training.worker import Diverged, Stop

log = logging.getLogger("zeroflow.training")

_MOST_SKIPPED = 5
"""Updates in a row that may be skipped before the run goes back to its newest checkpoint."""


_STEPS_TO_SETTLE = 3
"""Steps of a process in which things are compiled as a matter of course."""


class Recorder:
    """Writes what happens to metrics.jsonl and events.jsonl, which the parent follows.

    Rank 0 does. The others take part where figures are of all ranks, and write nothing.
    """

    def __init__(self, job: TrainingJob, books: Books, *, step: int, context: int) -> None:
        self._job, self._books, self._context = job, books, context
        self._rows_per_step = job.training.batch_rows
        self._tokens_per_step = self._rows_per_step * context
        self._metrics, self._events = job.run_dir / events.METRICS, job.run_dir / events.EVENTS
        # What a killed process logged after its last checkpoint comes again
        zero.on_first(lambda: events.keep(self._metrics, lambda line: 0 < step >= line["step"]))
        self._last = (books.account.steps, books.account.training)
        earlier = [_reading(line) for line in self.lines() if "update_ratio" in line]
        self._monitor = Monitor(entropy=job.shards.entropy, earlier=earlier)

    def tokens(self, step: int) -> int:
        return step * self._tokens_per_step

    def flops(self, step: int) -> int:
        return self.tokens(step) * self._job.model.flops_per_token(self._context)

    def event(self, name: str, **facts: object) -> None:
        if zero.rank() == 0:
            events.append(self._events, {"event": name, "time": time.time(), **facts})

    def alive(self) -> None:
        if zero.rank() == 0:
            (self._job.run_dir / events.ALIVE).touch()

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
        line = {
            "step": step,
            "tokens": self.tokens(step),
            "flops": self.flops(step),
            "loss": loss,
            "lr": metrics.learning_rate,
            "grad_norm": grad_norm,
            "update_ratio": update_ratio(state.optimizer).item(),
            "skipped_updates": skipped,
            "first_epoch": step * self._rows_per_step <= self._job.shards.train.rows,
            "tokens_per_second": rate,
            "peak_memory_mib": peak_memory_bytes(self._job) / 2**20,
            "goodput": account.shares,
        }
        if (mfu := self.mfu(rate)) is not None:
            line["mfu"] = mfu
        self._record(line)
        alarms = zero.on_first(lambda: self._monitor.alarms(_reading(line)))
        if zero.rank() > 0:
            return alarms
        for alarm in alarms:
            log.warning("step %d: %s", step, alarm)
        if alarms:
            log.warning(
                "its documents: zeroflow documents --run %s --step %d --cache-dir %s",
                *(self._job.run_dir.name, step, shlex.quote(str(self._job.run_dir.parents[1]))),
            )
            self.event("spike", step=step, alarms=alarms)
        return alarms

    def validation(self, step: int, loss: float, sample: str) -> None:
        bytes_per_token = self._job.shards.validation_bytes_per_token
        bpb = bits_per_byte(loss, bytes_per_token) if bytes_per_token else None
        line: events.Line = {"step": step, "tokens": self.tokens(step), "flops": self.flops(step)}
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

    def lines(self) -> list[events.Line]:
        return events.read(self._metrics)

    def _record(self, line: events.Line) -> None:
        if zero.rank() == 0:
            line["time"] = time.time()
            events.append(self._metrics, line)
            self.event("metrics", **line)

    def _rate(self, account: Account) -> float | None:
        """Since the last time."""
        steps, seconds = self._last
        self._last = (account.steps, account.training)
        return self.tokens_per_second(account.steps - steps, account.training - seconds)


def _reading(line: events.Line) -> Reading:
    return Reading(**{name: line[name] for name in Reading._fields})


def require_healthy(state: TrainState, metrics: StepMetrics, *, most_skipped: int) -> None:
    """
    Raises:
        Diverged: more than `most_skipped` updates in a row have been skipped until now.
    """
    in_a_row = int(state.skipped[0])
    if in_a_row > most_skipped:
        raise Diverged(
            f"step {state.step} has loss {metrics.loss.item()} and gradient norm "
            f"{metrics.grad_norm.item()}, the last of {in_a_row} steps in a row that are no finite "
            "numbers: lower --learning-rate or lengthen --warmup-steps",
            state.step,
        )


class Session:
    """One process's part of a run: from the newest checkpoint to the end, or until stopped."""

    def __init__(self, job: TrainingJob, clock: Clock) -> None:
        self.job, self.clock = job, clock
        self.train_rows = Rows(job.shards, "train")
        self.validation_rows = Rows(job.shards, "validation")
        self.state = new_state(job.model, job.training)
        zero.on_first(partial(checkpoint.clear_unfinished, job.checkpoints))
        if newest := zero.on_first(partial(checkpoint.latest, job.checkpoints)):
            checkpoint.load(self.state, newest, tokenizer=job.tokenizer.fingerprint)
            if self.state.step > job.training.steps:
                raise ValueError(
                    f"{newest} is of a run of more steps than the {job.training.steps} of this "
                    "one: move it away, or ask for more with --max-steps"
                )
            log.info("resumed at step %d from %s", self.state.step, newest)
        self.books = Books(job.run_dir, clock, kept=zero.rank() == 0)
        self.books.book(self.state.step, first=True)
        self.recorder = Recorder(job, self.books, step=self.state.step, context=self.context)
        self.saver = Saver(
            job.checkpoints,
            job.retention,
            tokenizer=job.tokenizer.fingerprint,
            on_saved=self.saved,
        )
        zero.on_first(partial(self.saver.require_room, self.state))
        self.val_loss: tuple[int, float] | None = None
        """Step and loss of the last validation."""

        self.recorder.event(
            "started", step=self.state.step, steps=job.training.steps, parts=job.shards.parts
        )
        self.settled_from = self.state.step + _STEPS_TO_SETTLE
        """Step from which nothing should be compiled any more."""

        if job.training.compute.compile:
            compiling.watch(clock, is_settled=lambda: self.state.step >= self.settled_from)

    @property
    def context(self) -> int:
        return self.train_rows.row_tokens - 1

    @cached_property
    def batches(self) -> Ahead:
        config = self.job.training
        batches = Batches(
            self.train_rows,
            end_of_text=self.train_rows.end_of_text,
            seed=config.seed,
            micro_batch_rows=config.micro_batch_rows,
            accumulate=config.accumulate,
            document_mask=config.document_mask,
            skips=self.job.skips,
            rank=zero.rank(),
            ranks=config.ranks,
            pin=config.compute.device == "cuda",
        )
        return Ahead(batches.micro_batches)

    def run(self, stop: Stop) -> bool:
        """Train; whether the last step was reached."""
        cadence, steps = self.job.cadence, self.job.training.steps
        gc.disable()  # it would halt the host in some step; `validate` collects
        if self.state.step == 0:
            self.validate()
        for metrics in train(self.state, self.batches, self.job.training, self.clock.enter):
            self.clock.enter("logging")
            self.recorder.alive()
            step, stopping = self.state.step, stop()
            last = step == steps
            if step % cadence.log == 0 or step == 1 or last:
                alarms = self.recorder.step(self.state, metrics)
                require_healthy(self.state, metrics, most_skipped=_MOST_SKIPPED)
                if alarms and self.job.roll_back_spikes:
                    raise Diverged(f"step {step} has {'; '.join(alarms)}", step)
            if step % cadence.validate_ == 0 or last:
                self.validate()
            if last:
                require_healthy(self.state, metrics, most_skipped=0)
            if step % cadence.checkpoint == 0 or last or stopping:
                self.save()
            if stopping and not last:
                self.saver.wait()
                return False
        self.saver.wait()
        self.write_result()
        return True

    def validate(self) -> None:
        self.clock.enter("validation")
        if self.val_loss is None:  # compiled in this process for the first time
            self.settled_from = max(self.settled_from, self.state.step + 1)
        config = self.job.training
        loss = validation_loss(
            self.state.model,
            self.validation_rows,
            self.job.validation_rows,
            config.micro_batch_rows,
            document_mask=config.document_mask,
        )
        gc.collect()
        self.val_loss = (self.state.step, loss)
        self.recorder.alive()
        sample = self.sample()
        self.recorder.validation(self.state.step, loss, sample)
        log.info("step %d: validation loss %.4f; sample: %r", self.state.step, loss, sample)

    def sample(self) -> str:
        job, model = self.job, self.state.model
        choice: dict[str, Any] = {
            "context": self.context,
            # who took another token might end before the others, who would wait for it
            "agree": lambda token: zero.on_first(lambda: token),
        }
        if job.tokenizer.path is None:
            ids = generate.complete_ids(model, job.tokenizer, job.sampling, **choice)
            return " ".join(map(str, ids))
        return generate.complete(model, job.tokenizer, job.prompt, job.sampling, **choice)

    def save(self) -> None:
        self.clock.enter("checkpoint")
        if self.state.skipped[0]:
            if zero.rank() == 0:
                log.warning("step %d: not saved, as its update was skipped", self.state.step)
            return
        step, loss = self.val_loss or (0, None)
        self.saver.save(self.state, val_loss=loss if step == self.state.step else None)
        self.books.book(self.state.step)

    def saved(self, path: Path) -> None:
        """Called by the thread that writes."""
        step = checkpoint.step_of(path)
        self.recorder.event("saved", step=step, path=str(path))
        self.recorder.alive()
        log.info("step %d: saved %s", step, path)

    def write_result(self) -> None:
        peak = peak_memory_bytes(self.job)
        if zero.rank() > 0:
            return
        lines = self.recorder.lines()
        validations = [line for line in lines if "val_loss" in line]
        logged = [line for line in lines if "loss" in line]
        account = self.books.account
        rate = self.recorder.tokens_per_second(account.steps, account.training)
        path = checkpoint.latest(self.job.checkpoints)
        assert path is not None, "the last step is always saved"
        result = TrainResult(
            checkpoint=path,
            steps=self.state.step,
            tokens=self.recorder.tokens(self.state.step),
            train_loss=logged[-1]["loss"],
            val_loss=validations[-1]["val_loss"],
            val_bpb=validations[-1]["val_bpb"],
            first_val_loss=validations[0]["val_loss"],
            tokens_per_second=rate,
            mfu=self.recorder.mfu(rate),
            peak_memory_bytes=peak,
            sample=validations[-1]["sample"],
        )
        artifacts.write_json(self.job.run_dir / RESULT, result.model_dump(mode="json"))


def peak_memory_bytes(job: TrainingJob) -> int:
    """Most that a rank has held so far: of the GPU by tensors, of a CPU process as resident set."""
    return zero.most(_peak_memory_bytes(job))


def _peak_memory_bytes(job: TrainingJob) -> int:
    if job.training.compute.device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage, whose figure Linux starts at the memory of the process that started this
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except FileNotFoundError:  # not Linux
        import resource  # not on Windows, where a GPU would be

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(job: TrainingJob, stop: Stop) -> None:
    """Train the job from its newest checkpoint to its end, or until asked to stop."""
    if job.training.compute.deterministic:
        worker.make_deterministic()
    clock = Clock(float(os.environ.get(LAUNCHED, time.time())), device=job.training.compute.device)
    session = Session(job, clock)
    try:
        ended = session.run(stop)
    finally:
        session.saver.wait()  # what is being written is what the next process goes on from
    account = session.books.book(session.state.step, ended=True)
    log.info("time of the training: %s", goodput.summary(account.shares, account.wall))
    step = session.state.step
    if ended:
        session.recorder.event("done", step=step)
    else:
        newest = checkpoint.newest_step(job.checkpoints)
        message = f"stopped at step {step} with a checkpoint; the same command goes on from there"
        if newest < step:
            kept = f"the newest one is of step {newest}" if newest else "there is none"
            message = f"stopped at step {step} without a checkpoint of it: {kept}"
        session.recorder.event("stopped", step=step, message=message)


if __name__ == "__main__":
    worker.main(TrainingJob, work)
