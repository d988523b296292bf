"""Pre-flight checks of the model on freshly initialised weights, which they do not change.

To add one, write a function that returns a `Check`, and yield it in `checks`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroflow.checks.check import Check
from zeroflow.data.batches import MicroBatch
from zeroflow.model.llama import INITIAL_STD, linear
from zeroflow.training import zero
from zeroflow.training.config import TrainingConfig
from zeroflow.training.loop import loss_sum
from zeroflow.training.state import TrainState
from zeroflow.training.workload import Workload

_ROWS, _CONTEXT = 1, 64
"""Shape of the random batch for a model that is not compiled."""

_WINDOW = 32
"""Positions to compare on either side of a change; the logits of all positions may not fit in
memory."""

_COMPILED_TOLERANCE = {24: 1e-3, 8: 5e-2, 4: 0.25}
"""Largest difference that rounding can explain, relative to the norm of the logits, by the number
of significand bits of the factors: fused kernels round in fewer places. With 4 bits, compiled and
eager models of 4 and 24 layers differed by 0.09 and 0.12, and from fp32 by 0.13 and 0.18."""


def checks(state: TrainState, config: TrainingConfig) -> Iterator[Check]:
    """Yield each check in turn, on random ids."""
    # A small batch is enough for eager code. Compiled code depends on the shape, so the shape of
    # the run is used: this is the code that trains, and training finds it in the cache
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
    """Return a micro-batch of random ids; each row is one document."""
    rows, context = workload.micro_batch_rows, workload.seq_len
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(workload.model.vocab_size, (rows, context + 1), generator=generator)
    numbers = torch.zeros(rows, context, dtype=torch.int32) if workload.document_mask else None
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * context, numbers)


def initial_loss(state: TrainState, batch: MicroBatch) -> Check:
    """Compare the loss of fresh weights with its expected value.

    After the last norm, the D features of a hidden state have a mean square of 1, so logits have a
    variance of s² = D · std². Their exponentials are log-normal, which adds s²/2 to ln V. The logit
    of the input token is an exception: the head is tied, so the part of the token's embedding that
    remains in the hidden state raises it, up to D · std. In a wide model of one block this adds a
    nat or more. Therefore this logit is measured, and limited to what fresh weights can give.

    The mean loss of N tokens with a vocabulary of V has a standard error of at most s/√N + s/√V.
    The tolerance is five standard errors, plus 0.05 for rounding and approximation.
    """
    D, V = state.model.config.hidden_size, state.model.config.vocab_size
    variance = D * INITIAL_STD**2
    # The norm of D normal numbers has a relative standard deviation of 1/√(2D)
    largest = D * INITIAL_STD * (1 + 5 / math.sqrt(2 * D))
    own = _own_logits(state, batch).clamp(max=largest)
    others = torch.full_like(own, math.log(V - 1) + variance / 2)
    repeated = batch.targets.to(own.device) == batch.inputs.to(own.device)
    expected = (torch.logaddexp(others, own) - own * repeated).mean().item()
    spread = math.sqrt(variance) * (1 / math.sqrt(batch.targets.numel()) + 1 / math.sqrt(V))
    allowed = 0.05 + 5 * spread
    loss = loss_sum(state.model, batch).item() / batch.valid
    passed = abs(loss - expected) <= allowed
    sentence = f"Expected: {expected:.3f}, from ln V = {math.log(V):.3f} and the spread of logits"
    if not passed:
        sentence += f", within {allowed:.3f}: look at `initialize`, the loss and the output head"
    return Check(
        name="loss at initialisation", passed=passed, figure=f"{loss:.3f} nats", sentence=sentence
    )


def _own_logits(state: TrainState, batch: MicroBatch) -> Tensor:
    """Return the logit of each input token at its own position, (B, T)."""
    device = zero.device_of(state.model)
    ids = batch.inputs.to(device)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden.float() * F.embedding(ids, weight)).sum(dim=-1)

    numbers = None if batch.documents is None else batch.documents.to(device)
    return state.model(ids, head, numbers).detach()


def gradients(state: TrainState, batch: MicroBatch) -> Check:
    """Check that a backward pass gives every parameter a finite, non-zero gradient."""
    (loss_sum(state.model, batch) / batch.valid).backward()
    parameters = dict(zero.named_parameters(state.model))
    idle = [name for name, p in parameters.items() if not _reached(p)]
    state.optimizer.zero_grad()
    sentence = "They get a finite, non-zero gradient in one backward pass"
    if idle:
        sentence = (
            f"The gradient of {idle[0]} is missing, zero or non-finite: set requires_grad, and "
            "look for a detach() between the parameter and the loss"
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
    """Change the tokens from one position on, and check that earlier logits stay the same."""
    context = batch.inputs.shape[1]
    # Not a multiple of a kernel's block size: a mask may be wrong only within a block
    place = min(context // 2 + 3, context - 1)
    changed = batch.inputs.clone()
    changed[:, place:] = _others(changed[:, place:], state)
    change = _change(state, batch, changed, place)
    leaks = change.before > change.by_chance
    sentence = f"A changed token changes logits from its position on, by up to {change.after:.3g}"
    if leaks:
        sentence = "Logits depend on later tokens: look at the mask of `attend`"
    elif change.after == 0:
        sentence = "Logits do not depend on any token: look at the embedding and the blocks"
    return Check(
        name="causality",
        passed=not leaks and change.after > 0,
        figure=f"earlier logits change by {change.before:.3g}",
        sentence=sentence,
    )


def documents(state: TrainState, batch: MicroBatch) -> Check:
    """Change the first of two documents in a row; check that the second's logits stay the same."""
    place = max(1, batch.inputs.shape[1] // 2 - 3)
    assert batch.documents is not None
    numbers = batch.documents.clone()
    numbers[:, place:] = 1
    changed = batch.inputs.clone()
    changed[:, :place] = _others(changed[:, :place], state)
    change = _change(state, batch._replace(documents=numbers), changed, place)
    leaks = change.after > change.by_chance
    sentence = f"A changed document changes its own logits, by up to {change.before:.3g}"
    if leaks:
        sentence = "Logits depend on other documents: look at the masks, or drop --document-mask"
    return Check(
        name="documents",
        passed=not leaks,
        figure=f"logits of other documents change by {change.after:.3g}",
        sentence=sentence,
    )


def compiled_equals_eager(state: TrainState, batch: MicroBatch, tolerance: float) -> Check:
    """Compare the logits of one row; eager logits of the whole batch may not fit in memory."""
    window = slice(0, 2 * _WINDOW)
    ours = _logits(state, batch.inputs, batch.documents, window)
    numbers = None if batch.documents is None else batch.documents[:1]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        eager = _logits(state, batch.inputs[:1], numbers, window)
    difference = ((ours - eager).norm() / eager.norm()).item()
    passed = difference <= tolerance
    sentence = f"Rounding explains differences up to {tolerance:g} of the norm of the logits"
    if not passed:
        sentence += ": use --no-compile, or remove the cache of compiled code"
    return Check(
        name="compiled equals eager",
        passed=passed,
        figure=f"relative difference {difference:.2g}",
        sentence=sentence,
    )


def _others(ids: Tensor, state: TrainState) -> Tensor:
    """Return a different id for each of `ids`."""
    V = state.model.config.vocab_size
    return (ids + max(1, V // 2)) % V


class _Change(NamedTuple):
    """Largest changes of the first row's logits when its tokens change."""

    before: float
    """Largest change of logits before the position."""

    after: float
    """Largest change of logits from the position on."""

    by_chance: float
    """Twice the change when the same row is recomputed: 0 with deterministic kernels. Masked
    tokens contribute exactly nothing, so no other tolerance is needed."""


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
    """Return the first row's logits at `places`, (places, V), with the run's kernels."""
    device = zero.device_of(state.model)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear(hidden[0, places], weight)

    there = None if numbers is None else numbers.to(device)
    return state.model(inputs.to(device), head, there).detach().float()
