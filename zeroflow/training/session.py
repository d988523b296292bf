"""Training on one rank: from the newest checkpoint to the last step, or until stopped."""

import gc
import logging
import time
from functools import cached_property, partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from zeroflow.data.batches import Prefetcher
from zeroflow.data.rows import Rows
from zeroflow.data.validation_sample import count_sample, draw_sample
from zeroflow.model.hugging_face import config_json
from zeroflow.training import batching, checkpoint, compiling, initial, sampling, zero
from zeroflow.training.events import CheckpointSkipped, Saved, Started
from zeroflow.training.failures import Diverged
from zeroflow.training.goodput import Clock, PhaseLedger
from zeroflow.training.job import TrainingJob, TrainResult
from zeroflow.training.loop import StepMetrics, train
from zeroflow.training.metrics import StepRecord, ValidationRecord, peak_memory_bytes
from zeroflow.training.recorder import Recorder
from zeroflow.training.saver import Saver
from zeroflow.training.state import new_state
from zeroflow.training.stopping import Stop
from zeroflow.training.validation import validation_loss

log = logging.getLogger("zeroflow.training")

_MOST_SKIPPED = 5
"""Maximum consecutive skipped updates; after one more, the run rolls back to its newest checkpoint.
The count is on the device, and is read when a step is logged, validated or saved."""

_STEPS_TO_COMPILE = 3
"""Number of steps at the start of a process in which compilation is expected."""


def require_healthy(step: int, metrics: StepMetrics, skipped: Tensor, *, most: int) -> None:
    """Check that at most `most` consecutive updates were skipped. Waits for the device.

    Args:
        skipped: number of consecutive skipped updates, on the device.

    Raises:
        Diverged: more updates were skipped.
    """
    if (in_a_row := int(skipped)) > most:
        raise Diverged(
            f"step {step} has loss {metrics.loss.item():.4f} and gradient norm "
            f"{metrics.grad_norm.item():.4g}; consecutive steps with a non-finite loss or "
            f"gradient: {in_a_row}",
            step,
        )


class Session:
    """Training in progress on one rank."""

    def __init__(self, job: TrainingJob, clock: Clock) -> None:
        self.job, self.clock = job, clock
        self.train_rows = Rows(job.shards, "train", local=job.local_cache)
        self.held_out = Rows(job.shards, "validation")
        self.held_out_sample = draw_sample(job.shards, job.validation_rows)
        self.held_out_counts = zero.on_rank0(  # on one rank only: it loads the tokenizer
            partial(count_sample, job.shards, job.tokenizer, self.held_out_sample)
        )
        self.state = new_state(job.training)
        zero.on_rank0(partial(checkpoint.clear_unfinished, job.folder.checkpoints))
        if newest := zero.on_rank0(partial(checkpoint.latest, job.folder.checkpoints)):
            checkpoint.load(self.state, newest, tokenizer=job.tokenizer.fingerprint)
            if self.state.step > job.training.steps:
                raise ValueError(
                    f"{newest} is beyond --max-steps {job.training.steps} of this run: move it "
                    "away, or raise --max-steps"
                )
            log.info("resumed at step %d from %s", self.state.step, newest)
        elif job.initial:
            initial.load(self.state.model, job.initial)
            log.info("starting from the weights in %s", job.initial)
        self.ledger = PhaseLedger(job.folder, clock, kept=zero.rank() == 0)
        self.ledger.book(self.state.step, first=True)
        self.recorder = Recorder(job, self.ledger, step=self.state.step)
        self.saver = Saver(
            job.folder.checkpoints,
            job.retention,
            tokenizer=job.tokenizer.fingerprint,
            config=config_json(
                job.model, context=self.context, end_of_text=job.tokenizer.end_of_text
            ),
            on_saved=self.saved,
        )
        # Before the first step, so that a full disk costs no training
        zero.on_rank0(partial(self.saver.require_room, self.state))
        self.val_loss: tuple[int, float] | None = None
        """Step and loss of the last validation."""

        self.lowest_val_loss = zero.on_rank0(self.recorder.lowest_validation_loss)
        self.most_skipped = torch.zeros_like(self.state.skipped[0])
        """Largest number of consecutive skipped updates in this process, on the device."""

        self.recorder.event(
            Started(
                time=time.time(),
                step=self.state.step,
                steps=job.training.steps,
                parts=job.shards.parts,
            )
        )
        self.settled_from = self.state.step + _STEPS_TO_COMPILE
        """Step from which a compilation is unexpected and logged as a warning."""

        if job.training.workload.compile:
            compiling.watch(clock, is_settled=lambda: self.state.step >= self.settled_from)

    @property
    def context(self) -> int:
        return self.train_rows.row_tokens - 1

    @cached_property
    def batches(self) -> Prefetcher:
        made = batching.batches(self.train_rows, self.job.training, self.job.order)
        return Prefetcher(made.micro_batches)

    def run(self, stop: Stop) -> bool:
        """Train to the last step and return True; return False if `stop` ended training earlier."""
        cadence, steps = self.job.cadence, self.job.training.steps
        # An automatic garbage collection stalls the host in the middle of a step, and each rank at
        # a different step, so that all wait for each in turn. `validate` collects on all ranks at
        # the same time instead. That is fast, because it skips the frozen objects: modules and
        # state, which exist until the end
        gc.disable()
        gc.collect()
        gc.freeze()
        if self.state.step == 0:
            self.validate()
        for metrics in train(self.state, self.batches, self.job.training, self.clock.enter):
            self.clock.enter("logging")
            # Every rank must call `stop` at every step: the ranks exchange their requests
            step, stopping = self.state.step, stop()
            self.recorder.progress("training", step, steps)
            self.most_skipped = torch.maximum(self.most_skipped, self.state.skipped[0])
            last = step == steps
            logs = step % cadence.log == 0 or step == 1 or last
            validates = step % cadence.validate_ == 0 or last
            saves = step % cadence.checkpoint == 0 or last
            alarms = self.recorder.step(self.state, metrics) if logs else []
            if logs or validates or saves:
                require_healthy(step, metrics, self.most_skipped, most=_MOST_SKIPPED)
            # All health checks come before the save, so that no checkpoint has a diverged state
            if alarms and self.job.roll_back_spikes:
                raise Diverged(f"step {step} has {'; '.join(alarms)}", step)
            is_best = validates and self.validate()
            if last:
                require_healthy(step, metrics, self.state.skipped[0], most=0)
            if saves or is_best or stopping:
                self.save(promised=last or is_best or stopping)
            if stopping and not last:
                self.saver.wait()
                return False
        self.saver.wait()
        self.write_result()
        return True

    def validate(self) -> bool:
        """Validate, and return True if the loss is the lowest so far, excluding that of step 0."""
        self.clock.enter("validation")
        if self.val_loss is None:  # the first validation compiles the model for its own shape
            self.settled_from = max(self.settled_from, self.state.step + 1)
        loss = validation_loss(
            self.state.model,
            self.held_out,
            self.held_out_sample.rows,
            self.job.training.workload,
            self.held_out_sample.documents[:, 1:],
            partial(self.recorder.progress, "validation"),
        )
        gc.collect()
        self.val_loss = (self.state.step, loss.mean)
        self.recorder.alive()
        sample = self.sample()
        self.recorder.validation(
            self.state.step, loss, sample, self.held_out_counts.bytes_per_token
        )
        log.info("step %d: validation loss %.4f; sample: %r", self.state.step, loss.mean, sample)
        if self.state.step == 0 or not loss.mean < self.lowest_val_loss:
            return False
        self.lowest_val_loss = loss.mean
        return True

    def sample(self) -> str:
        job, model = self.job, self.state.model
        tokens = count(1)

        def agree(token: int) -> int:
            self.recorder.progress("text sample", next(tokens), job.sampling.tokens)
            return _of_rank0(token)

        if job.tokenizer.path is None:
            ids = sampling.generate_ids(
                model, job.tokenizer, job.sampling, context=self.context, agree=agree
            )
            return " ".join(map(str, ids))
        return sampling.generate(
            *(model, job.tokenizer, job.prompt, job.sampling),
            context=self.context,
            agree=agree,
        )

    def save(self, *, promised: bool) -> None:
        """Save the state, unless updates were skipped.

        Args:
            promised: wait for the checkpoint before; otherwise, if it is still being written, this
                one is skipped.
        """
        self.clock.enter("checkpoint")
        if self.state.skipped[0] or self.most_skipped > _MOST_SKIPPED:
            if zero.rank() == 0:
                log.warning("step %d: not saved, because updates were skipped", self.state.step)
            return
        step, loss = self.val_loss or (0, None)
        saved = self.saver.save(
            self.state,
            val_loss=loss if step == self.state.step else None,
            promised=promised or self.job.retention.keeps_forever(self.state.step),
        )
        if not saved:
            self.checkpoint_skipped()
        self.ledger.book(self.state.step)

    def checkpoint_skipped(self) -> None:
        """Report a checkpoint that was skipped because the disk is slower than training."""
        step = self.state.step
        self.recorder.event(CheckpointSkipped(time=time.time(), step=step))
        if zero.rank() == 0:
            log.warning(
                "step %d: checkpoint skipped, because the one before is still being written; "
                "training does not wait for it. --checkpoint-every %d is too short for this disk",
                *(step, self.job.cadence.checkpoint),
            )

    def saved(self, path: Path, seconds: float) -> None:
        """Report a complete checkpoint, written in `seconds`. Called in the writing thread."""
        step = checkpoint.step_of(path)
        self.recorder.event(Saved(time=time.time(), step=step, path=str(path), seconds=seconds))
        self.recorder.alive()
        log.info("step %d: saved %s", step, path)

    def write_result(self) -> None:
        peak = peak_memory_bytes(self.job)
        if zero.rank() > 0:
            return
        records, meter = self.recorder.records(), self.recorder.meter
        steps = [record for record in records if isinstance(record, StepRecord)]
        validations = [record for record in records if isinstance(record, ValidationRecord)]
        account = self.ledger.account
        rate = meter.tokens_per_second(account.steps, account.training)
        path = checkpoint.latest(self.job.folder.checkpoints)
        assert path is not None, "the last step is always saved"
        result = TrainResult(
            checkpoint=path,
            steps=self.state.step,
            tokens=meter.tokens(self.state.step),
            train_loss=steps[-1].loss,
            val_loss=validations[-1].val_loss,
            val_error=validations[-1].val_error,
            val_bpb=validations[-1].val_bpb,
            validated=self.held_out_counts,
            first_val_loss=validations[0].val_loss,
            tokens_per_second=rate,
            mfu=meter.mfu(rate),
            peak_memory_bytes=peak,
            sample=validations[-1].sample,
        )
        result.write(self.job.folder.training)


def _of_rank0(token: int) -> int:
    """Return the token that rank 0 chose.

    Ranks may round differently and choose different tokens. If one rank ended its text earlier, the
    others would wait forever for its part of the next forward pass.
    """
    return zero.on_rank0(lambda: token)
