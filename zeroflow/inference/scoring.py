"""Log-likelihoods of given tokens, computed in batches of texts of similar length."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from zeroflow.data.arrays import Float64Array
from zeroflow.data.batches import IGNORED
from zeroflow.model.llama import Llama, linear
from zeroflow.training import validation

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Maximum number of tokens of a batch, by device."""

_LOGITS_BYTES = 2**28
"""Maximum size of the logits that are in memory at once."""


class Request(NamedTuple):
    """Tokens of which the last ones are scored."""

    ids: Sequence[int]
    """At most one more than the model's context length."""

    scored: int
    """Number of ids at the end whose probability is wanted; fewer than all."""


class Score(NamedTuple):
    nats: float
    """Sum of -log p over the scored tokens."""

    greedy: bool
    """True if each scored token is the most likely one."""


@torch.no_grad()
def score(
    model: Llama, requests: Sequence[Request], on_batch: Callable[[int], None] = lambda done: None
) -> list[Score]:
    """Return the score of each request, in their order.

    Args:
        on_batch: called after each batch with the number of finished requests.
    """
    device = model.model.embed_tokens.weight.device
    found: dict[int, Score] = {}
    for places in _batches(requests, _BATCH_TOKENS[device.type]):
        rows = [requests[place] for place in places]
        width = max(len(row.ids) for row in rows) - 1
        # Padding follows the text, where causal attention hides it
        inputs = torch.zeros(len(rows), width, dtype=torch.int64)
        targets = torch.full((len(rows), width), IGNORED)
        for number, row in enumerate(rows):
            end = len(row.ids) - 1
            inputs[number, :end] = torch.tensor(row.ids[:-1])
            targets[number, end - row.scored : end] = torch.tensor(row.ids[-row.scored :])
        sums = model(inputs.to(device), partial(_sums, targets=targets.to(device))).tolist()
        for place, row, (nats, hits) in zip(places, rows, sums, strict=True):
            found[place] = Score(nats, hits == row.scored)
        on_batch(len(found))
    return [found[place] for place in range(len(requests))]


def _batches(requests: Sequence[Request], most: int) -> Iterator[list[int]]:
    """Yield the places of requests that fit in a batch of `most` tokens; the longest come first."""
    order = sorted(range(len(requests)), key=lambda place: -len(requests[place].ids))
    while order:
        rows = max(1, most // len(requests[order[0]].ids))
        yield order[:rows]
        order = order[rows:]


def _sums(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the nats of each row, and the number of its targets that are the most likely token.

    Args:
        hidden: hidden states, (B, T, D).
        weight: output matrix, (V, D).
        targets: ids, (B, T); `IGNORED` where nothing is scored.

    Returns:
        (B, 2), in fp64.
    """
    valid = targets != IGNORED
    rows = valid.nonzero()[:, 0]
    sums = torch.zeros(len(targets), 2, dtype=torch.float64, device=hidden.device)
    size = max(1, _LOGITS_BYTES // (4 * len(weight)))
    for h, wanted, row in zip(
        hidden[valid].split(size), targets[valid].split(size), rows.split(size), strict=True
    ):
        logits = linear(h, weight).float()  # (n, V)
        nats = logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0]
        hits = logits.argmax(-1) == wanted
        sums.index_add_(0, row, torch.stack((nats.double(), hits.double()), dim=1))
    return sums


class Ratio(NamedTuple):
    value: float
    error: float | None
    """Standard error; None for a single sampled unit."""


def ratio(values: Float64Array, sizes: Float64Array) -> Ratio:
    """Return the sum of `values` divided by that of `sizes`; each pair is a sampled unit."""
    return Ratio(*validation.estimate(values, sizes))
