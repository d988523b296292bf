"""The gate before training: seconds, so that a broken run costs no hours.

The run's own model, data, device, precision and compile settings, through the functions that
train. Every check is a figure and a sentence; one that fails ends the run before its first step,
and is not tried again. A micro-batch that does not fit is halved first, as training would do.
Runs in a process of its own: `-m zeroflow.checks.preflight JOB.json`.
"""

import hashlib
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroflow import artifacts, records, reuse
from zeroflow.config import Config
from zeroflow.data.batches import MicroBatch
from zeroflow.data.rows import Rows
from zeroflow.data.shards import ShardSet, Split
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import INITIAL_STD, ModelConfig, linear
from zeroflow.reuse import CheckResult
from zeroflow.run_folder import RunFolder
from zeroflow.training import batching, checkpoint, recovery, worker, zero
from zeroflow.training.checkpoint import CheckpointError, Retention, Saver
from zeroflow.training.config import TrainingConfig
from zeroflow.training.job import RankJob, RunIsBusy, TrainingFailed, TrainingJob
from zeroflow.training.launch import launch
from zeroflow.training.loop import loss_sum, train_step
from zeroflow.training.state import TrainState, new_state
from zeroflow.training.worker import Stop
from zeroflow.training.workload import Workload

log = logging.getLogger("zeroflow.checks.preflight")

_ROWS, _CONTEXT = 1, 64
_WINDOW = 32
"""Logits that are compared on either side of a change, as all of them may not fit in memory."""

_SAMPLED_ROWS = 256
_TEXT_ROWS = 16
_SAMPLED_PARTS = 3
_LEAST_RETURNED = 0.75
_COMPILED_TOLERANCE = {24: 1e-3, 8: 5e-2, 4: 0.25}
"""Distance that rounding explains, relative to the logits' norm, by `significand_bits`. Fused
kernels round in fewer places, and a different rounding of 8 bits tips one of 4: in those, fresh
models of 4 and 24 layers were 0.09 and 0.12 apart, and 0.13 and 0.18 from fp32."""


class Check(Config):
    name: str
    passed: bool
    figure: str
    """What was found, with its unit."""

    sentence: str
    """What that means; where it failed, also what to change."""


class PreflightJob(RankJob):
    """Its training has micro-batches as they are trained with, after what did not fit."""

    shards: ShardSet
    tokenizer: Tokenizer
    identity: dict[str, Any]
    """What decides how the checks end."""


class PreflightResult(CheckResult):
    """What the pre-flight leaves in preflight.json."""

    seconds: float
    checks: list[Check]


class PreflightFailed(RuntimeError):
    """A check before training failed."""

    def __init__(self, result: PreflightResult) -> None:
        failed = [check for check in result.checks if not check.passed]
        lines = "\n".join(f"  {check.name}: {check.figure}; {check.sentence}" for check in failed)
        super().__init__(
            f"pre-flight: {len(failed)} of {len(result.checks)} checks failed, and nothing was "
            f"trained:\n{lines}\n--skip-preflight trains nevertheless"
        )
        self.result = result


def known(job: TrainingJob) -> PreflightResult | None:
    """The earlier result, if the same job passed on the same kind of device."""
    found = read(job.folder)
    same = found is not None and found.passed and found.job == _fingerprint(_identity(job))
    return found.replace(reused=True, why=reuse.PASSED) if found and same else None


def read(folder: RunFolder) -> PreflightResult | None:
    """What the pre-flight of a run has found, if it had one."""
    path = folder.preflight
    return PreflightResult.model_validate(artifacts.read_json(path)) if path.exists() else None


def check(job: TrainingJob) -> PreflightResult:
    """Check the job in processes of their own: one, and another for each size that did not fit.

    A size that does not fit is noted in the run's ledger as training would do it, which so begins
    with one that does.

    Raises:
        TrainingFailed: the process ended by an error, of which being out of memory is none.
    """
    identity = _identity(job)
    before = read(job.folder)
    why = reuse.since(identity, before)
    log.info("pre-flight has to run: %s", why)
    return _check(job, identity).replace(why=why)


def _check(job: TrainingJob, identity: dict[str, Any]) -> PreflightResult:
    while True:
        ledger = recovery.read(job.folder)
        now = recovery.applied(job, ledger)
        try:
            return _launched(now, identity)
        except RunIsBusy:
            raise
        except TrainingFailed as failure:
            if failure.reason != "out of memory":
                failure.add_advice("this was in the pre-flight: nothing was trained")
                raise
            if (entry := recovery.remedy(now, failure, ledger)) is None:
                return _does_not_fit(now, failure, identity)
            recovery.note(job.folder, entry)


def _launched(now: TrainingJob, identity: dict[str, Any]) -> PreflightResult:
    job = PreflightJob(
        run_dir=now.run_dir,
        training=now.training,
        shards=now.shards,
        tokenizer=now.tokenizer,
        identity=identity,
    )
    artifacts.write_json(job.folder.preflight_job, job.model_dump(mode="json"))
    try:
        launch(
            "zeroflow.checks.preflight",
            job.folder.preflight_job,
            lambda event: None,
            ranks=now.training.workload.ranks,
            compile_cache=now.compile_cache,
        )
    finally:
        # of a process that was killed
        shutil.rmtree(job.folder.preflight_checkpoint, ignore_errors=True)
    result = read(job.folder)
    assert result is not None, "written by a process that ended well"
    return result


def _does_not_fit(
    now: TrainingJob, failure: TrainingFailed, identity: dict[str, Any]
) -> PreflightResult:
    sentence = f"{recovery.advice(now, failure)} ({str(failure).splitlines()[0]})"
    check = Check(name="micro-batch", passed=False, figure="1 row does not fit", sentence=sentence)
    result = _result(identity, [check], seconds=0.0)
    artifacts.write_json(now.folder.preflight, result.model_dump(mode="json"))
    return result


def _result(identity: dict[str, Any], done: list[Check], *, seconds: float) -> PreflightResult:
    return PreflightResult(
        passed=all(check.passed for check in done),
        seconds=seconds,
        checks=done,
        job=_fingerprint(identity),
        identity=identity,
    )


def _fingerprint(identity: dict[str, Any]) -> str:
    return artifacts.fingerprint(list(identity.values()))


def _identity(job: TrainingJob) -> dict[str, Any]:
    """All that decides how the checks end; not the length of the training."""
    return {
        "model": job.model.model_dump(mode="json"),
        "training": job.training.identity,
        "learning_rate": job.training.schedule.peak,
        "shards": job.shards.path.name,
        "tokenizer": job.tokenizer.fingerprint,
        "device": job.training.workload.device_name,
        "torch": torch.__version__,
    }


def checks(job: PreflightJob) -> Iterator[Check]:
    """Every check in turn. No step is made of rows that are wrong."""
    sound = True
    for of_data in data_checks(job):
        sound = sound and of_data.passed
        yield of_data
    state = new_state(job.training)
    yield from map(_of_all, model_checks(state, job.training))
    if sound:
        yield _of_all(micro_batch(state, job.training, Rows(job.shards, "train")))
    yield round_trip(state, job.folder.preflight_checkpoint, job.tokenizer.fingerprint)


def data_checks(job: PreflightJob) -> Iterator[Check]:
    whole = _of_all(checksums(job.shards))
    yield whole
    if not whole.passed:
        return
    of_model = _of_all(token_ids(job.shards, job.tokenizer, job.model))
    yield of_model
    if of_model.passed and job.tokenizer.path is not None:
        yield _of_all(text(Rows(job.shards, "train"), job.tokenizer))


def _of_all(check: Check) -> Check:
    """`check` as rank 0 made it, but passed only if it did on every rank."""
    of_first = zero.on_rank0(lambda: check.passed)
    if not check.passed and (zero.rank() == 0 or of_first):
        log.warning("pre-flight: %s: FAILED, %s; %s", check.name, check.figure, check.sentence)
    if zero.is_any(not check.passed) and check.passed:
        sentence = "failed on another rank, whose log says why"
        return check.replace(passed=False, sentence=sentence)
    return check


def model_checks(state: TrainState, config: TrainingConfig) -> Iterator[Check]:
    """Checks of fresh weights, which they leave as they are.

    On random ids, and few of them. A compiled model is compiled for one shape, so it gets that of
    the run: training then finds the code in the cache.
    """
    work = config.workload
    shape = work
    if not work.compile:
        shape = work.replace(micro_batch_rows=_ROWS, seq_len=min(work.seq_len, _CONTEXT))
    batch = random_batch(shape, seed=config.seed)
    yield initial_loss(state, batch)
    yield gradients(state, batch)
    yield causality(state, batch)
    if batch.documents is not None:
        yield documents(state, batch)
    if work.compile:
        yield compiled_equals_eager(state, batch, _COMPILED_TOLERANCE[work.significand_bits])


def random_batch(workload: Workload, *, seed: int) -> MicroBatch:
    """A micro-batch of random ids, in which each row is one document."""
    rows, context = workload.micro_batch_rows, workload.seq_len
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(workload.model.vocab_size, (rows, context + 1), generator=generator)
    numbers = torch.zeros(rows, context, dtype=torch.int32) if workload.document_mask else None
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * context, numbers)


def initial_loss(state: TrainState, batch: MicroBatch) -> Check:
    """A model that knows nothing gives every token the same chance, but for its random logits.

    Behind the last norm a hidden state has D features of size 1, so logits have a variance of
    s² = D · std², which adds s²/2 to ln V (the mean of a log-normal). The mean over N tokens of a
    vocabulary of V strays by s/√N + s/√V; five times that is allowed, and 0.05 for all else.
    """
    V, variance = state.model.config.vocab_size, state.model.config.hidden_size * INITIAL_STD**2
    expected = math.log(V) + variance / 2
    strays = math.sqrt(variance) * (1 / math.sqrt(batch.valid) + 1 / math.sqrt(V))
    allowed = 0.05 + 5 * strays
    loss = loss_sum(state.model, batch).item() / batch.valid
    passed = abs(loss - expected) <= allowed
    sentence = f"expected ln V = {math.log(V):.3f} and {variance / 2:.3f} for the spread of logits"
    if not passed:
        sentence += f", to within {allowed:.3f}: look at `initialize`, the loss and the output head"
    return Check(
        name="loss at initialisation", passed=passed, figure=f"{loss:.3f} nats", sentence=sentence
    )


def gradients(state: TrainState, batch: MicroBatch) -> Check:
    (loss_sum(state.model, batch) / batch.valid).backward()
    parameters = dict(zero.named_parameters(state.model))
    idle = [name for name, p in parameters.items() if not _reached(p)]
    state.optimizer.zero_grad()
    sentence = "one backward pass gives each a gradient of finite numbers"
    if idle:
        sentence = (
            f"{idle[0]} gets none, or one of no finite numbers: let it require one, and look for a "
            "detach() between it and the loss"
        )
    return Check(
        name="gradients",
        passed=not idle,
        figure=f"{len(parameters) - len(idle)} of {len(parameters)} parameters",
        sentence=sentence,
    )


def _reached(parameter: Tensor) -> bool:
    if parameter.grad is None:
        return False
    gradient = zero.full_tensor(parameter.grad)
    return bool(gradient.any() and gradient.isfinite().all())


def causality(state: TrainState, batch: MicroBatch) -> Check:
    context = batch.inputs.shape[1]
    # no edge of a kernel's blocks: within one, a token may see what it should not
    place = min(context // 2 + 3, context - 1)
    changed = batch.inputs.clone()
    changed[:, place:] = _others(changed[:, place:], state)
    change = _change(state, batch, changed, place)
    leaks = change.before > change.by_chance
    sentence = (
        f"in logits before a token that changes; those from it on change by {change.after:.3g}"
    )
    if leaks:
        sentence = "logits see tokens that come later: look at the mask of `attend`"
    elif change.after == 0:
        sentence = "logits see no token at all: look at the embedding and the blocks"
    return Check(
        name="causality",
        passed=not leaks and change.after > 0,
        figure=f"largest change {change.before:.3g}",
        sentence=sentence,
    )


def documents(state: TrainState, batch: MicroBatch) -> Check:
    """Two documents in a row, of which the first changes."""
    place = max(1, batch.inputs.shape[1] // 2 - 3)
    assert batch.documents is not None
    numbers = batch.documents.clone()
    numbers[:, place:] = 1
    changed = batch.inputs.clone()
    changed[:, :place] = _others(changed[:, :place], state)
    change = _change(state, batch._replace(documents=numbers), changed, place)
    leaks = change.after > change.by_chance
    sentence = f"in logits behind a document that changes; its own change by {change.before:.3g}"
    if leaks:
        sentence = "logits see other documents: look at the masks, or drop --document-mask"
    return Check(
        name="documents",
        passed=not leaks,
        figure=f"largest change {change.after:.3g}",
        sentence=sentence,
    )


def compiled_equals_eager(state: TrainState, batch: MicroBatch, tolerance: float) -> Check:
    """In the logits of one row. Eager, all of them may not fit in memory."""
    window = slice(0, 2 * _WINDOW)
    ours = _logits(state, batch.inputs, batch.documents, window)
    numbers = None if batch.documents is None else batch.documents[:1]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        eager = _logits(state, batch.inputs[:1], numbers, window)
    difference = ((ours - eager).norm() / eager.norm()).item()
    passed = difference <= tolerance
    sentence = f"as a part of the logits' norm; rounding explains {tolerance:g}"
    if not passed:
        sentence += ": use --no-compile, or clear the cache of compiled code"
    return Check(
        name="compiled equals eager",
        passed=passed,
        figure=f"{difference:.2g} apart",
        sentence=sentence,
    )


def micro_batch(state: TrainState, config: TrainingConfig, rows: Rows) -> Check:
    """A step of the run's shape. If it has several micro-batches, of two: the second meets the
    gradients of the first in memory, as all that follow."""
    work = config.workload
    few = config.replace(workload=work.replace(accumulate=min(2, work.accumulate)))
    batches = batching.batches(rows, few)
    on_gpu = work.device == "cuda"
    if on_gpu:  # else what the checks before have left would be counted, in pieces
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    metrics = train_step(state, batches.micro_batches(0), config)
    loss, grad_norm = metrics.loss.item(), metrics.grad_norm.item()
    figure = f"{work.micro_batch_rows} rows x {rows.row_tokens - 1:,} tokens fit"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        figure += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} of {total / 2**30:.1f} GiB"
    passed = math.isfinite(loss + grad_norm)
    sentence = (
        f"forward, backward and optimiser in {time.monotonic() - begin:.1f} s, loss {loss:.3f}, "
        f"gradient norm {grad_norm:.3g}"
    )
    if not passed:
        sentence += ": no finite numbers; look at --precision, and at the rows of the first step"
    return Check(name="micro-batch", passed=passed, figure=figure, sentence=sentence)


def token_ids(shards: ShardSet, tokenizer: Tokenizer, model: ModelConfig) -> Check:
    limit = min(tokenizer.vocab_size, model.vocab_size)
    splits: tuple[Split, ...] = ("train", "validation")
    ids = np.concatenate([_spread(Rows(shards, split), _SAMPLED_ROWS) for split in splits])
    lowest, highest = int(ids.min()), int(ids.max())
    passed = lowest >= 0 and highest < limit
    sentence = f"found in {len(ids)} rows, of a vocabulary of {limit:,}"
    if not passed:
        sentence += (
            f": the rows are of another tokenizer than {tokenizer.name}, or damaged; remove "
            f"{shards.path}, and the same command builds them anew"
        )
    return Check(
        name="token ids", passed=passed, figure=f"{lowest:,} to {highest:,}", sentence=sentence
    )


def text(rows: Rows, tokenizer: Tokenizer) -> Check:
    """Ids of the tokenizer's own text come back when that is tokenised again.

    All but those at the cut ends of rows; of another tokenizer's ids fewer do.
    """
    backend = tokenizer.load()
    returned = total = 0
    beginning = ""
    for row in _spread(rows, _TEXT_ROWS):
        for document in np.split(row, np.flatnonzero(row == rows.end_of_text) + 1):
            ids = document[document != rows.end_of_text].tolist()
            words = backend.decode(ids, skip_special_tokens=False)
            again = backend.encode(words, add_special_tokens=False).ids
            returned += (Counter(ids) & Counter(again)).total()
            total += len(ids)
            beginning = beginning or " ".join(words.split())[:40]
    share = returned / max(1, total)
    passed = share >= _LEAST_RETURNED
    sentence = (
        f"of {total:,} ids come back when their text is tokenised again, such as {beginning!r}"
    )
    if not passed:
        sentence += (
            f": these are no ids of {tokenizer.name}, or it cannot spell them; look at `zeroflow "
            "data`, and remove the shards if they are another tokenizer's"
        )
    return Check(name="text", passed=passed, figure=f"{share:.1%}", sentence=sentence)


def checksums(shards: ShardSet) -> Check:
    """Of a few parts. All were compared, or written, by the stage that gave this set."""
    numbers = np.unique(np.linspace(0, shards.parts - 1, _SAMPLED_PARTS).astype(int)).tolist()
    try:
        files = sum(len(artifacts.verify(shards.part_paths[n])["files"]) for n in numbers)
    except artifacts.DamagedArtifact as damage:
        sentence = f"{damage}: the same command again sets that part aside and makes it anew"
        return Check(name="checksums", passed=False, figure="a part is damaged", sentence=sentence)
    return Check(
        name="checksums",
        passed=True,
        figure=f"{files} files",
        sentence=f"as they were written, in {len(numbers)} of {shards.parts} parts; all parts were "
        "looked at when the shards were built or reused",
    )


def round_trip(state: TrainState, folder: Path, fingerprint: str) -> Check:
    """Save the state, overwrite it with zeros, load it, and compare every tensor's bits.

    If they are the same, the state is left as it was. `folder` is removed.
    """
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    zero.on_rank0(remove)
    begin = time.monotonic()
    tensors = _tensors(state)
    size = f"{sum(tensor.nbytes for tensor in tensors.values()) / 1e6:,.0f} MB"
    if zero.ranks() > 1:
        size += " on a rank"
    before, step = _digests(tensors), state.step
    try:
        saver = Saver(folder, Retention(keep=1), tokenizer=fingerprint)
        saver.save(state)
        zero.on_rank0(saver.wait)
        for tensor in tensors.values():
            tensor.zero_()
        saved = zero.on_rank0(partial(checkpoint.latest, folder))
        if saved is None:
            raise CheckpointError("what was written is damaged: look at the disk")
        checkpoint.load(state, saved, tokenizer=fingerprint)
    except (OSError, CheckpointError) as error:
        found = Check(name="checkpoint", passed=False, figure=size, sentence=str(error))
    else:
        after = _digests(tensors)
        lost = [name for name in before if after[name] != before[name]]
        passed = not lost and state.step == step
        sentence = f"written and read back with the same bits in {time.monotonic() - begin:.1f} s"
        if not passed:
            what = f"{len(lost)} tensors, such as {lost[0]}," if lost else "the step"
            sentence = f"{what} came back otherwise: look at `checkpoint`, and at the disk"
        found = Check(name="checkpoint", passed=passed, figure=size, sentence=sentence)
    found = _of_all(found)  # by which all have read it
    zero.on_rank0(remove)
    return found


def _spread(rows: Rows, most: int) -> npt.NDArray[np.integer[Any]]:
    """Some rows from all over a split."""
    count = min(most, len(rows))
    return rows[np.linspace(0, len(rows), count, endpoint=False).astype(np.int64)]


def _others(ids: Tensor, state: TrainState) -> Tensor:
    """Another id in the place of each."""
    V = state.model.config.vocab_size
    return (ids + max(1, V // 2)) % V


class _Change(NamedTuple):
    """The largest of the first row's logits."""

    before: float
    """In front of some place."""

    after: float
    """From there on."""

    by_chance: float
    """Twice that of the same row again: 0, but where kernels do not repeat themselves. What is
    masked adds exactly nothing."""


def _change(state: TrainState, batch: MicroBatch, changed: Tensor, place: int) -> _Change:
    window = slice(max(0, place - _WINDOW), place + _WINDOW)
    old, again, new = (
        _logits(state, ids, batch.documents, window)
        for ids in (batch.inputs, batch.inputs, changed)
    )
    change = (new - old).abs().amax(dim=-1)
    border = place - window.start
    return _Change(
        before=change[:border].max().item(),
        after=change[border:].max().item(),
        by_chance=2 * (again - old).abs().max().item(),
    )


def _logits(state: TrainState, inputs: Tensor, numbers: Tensor | None, places: slice) -> Tensor:
    """Of some places in the first row (places, V), by the kernels that train."""
    device = state.model.model.embed_tokens.weight.device

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear(hidden[0, places], weight)

    there = None if numbers is None else numbers.to(device)
    return state.model(inputs.to(device), head, there).detach().float()


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """All that training changes; listed here, so that a checkpoint that forgets some is noticed."""
    tensors = {"skipped": state.skipped}
    for name, parameter in zero.named_parameters(state.model):
        tensors[name] = zero.local_shard(parameter.detach())
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"{key} of {name}"] = zero.local_shard(value)
    return tensors


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run
        return dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))


def _digest(tensor: Tensor) -> str:
    data = tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


def work(job: PreflightJob, stop: Stop) -> None:
    begin = time.monotonic()
    if job.training.workload.deterministic:
        worker.make_deterministic()
    history = job.folder.events
    done: list[Check] = []
    stopped = False
    for check in checks(job):
        if check.passed:
            log.info("pre-flight: %s: %s; %s", check.name, check.figure, check.sentence)
        done.append(check)
        if stopped := stop():
            break
    if zero.rank() > 0:
        return
    if stopped:
        message = "the pre-flight was stopped; the same command repeats it"
        records.append(history, {"event": "stopped", "message": message})
        return
    result = _result(job.identity, done, seconds=time.monotonic() - begin)
    artifacts.write_json(job.folder.preflight, result.model_dump(mode="json"))
    verdict = "passed" if result.passed else "FAILED"
    log.info("pre-flight %s: %d checks in %.1f s", verdict, len(done), result.seconds)
    records.append(history, {"event": "done"})


if __name__ == "__main__":
    worker.main(PreflightJob, work)
