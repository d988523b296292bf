"""Loss of a model on texts: files, datasets of the Hub, or the held-out rows of its run."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from zeroflow.data import arrays, encoding
from zeroflow.data.arrays import Int64Array
from zeroflow.data.corpus import CorpusConfig, absolute, resolve_corpus
from zeroflow.data.documents import Tally
from zeroflow.data.hub_errors import HubError
from zeroflow.data.rows import Rows
from zeroflow.data.slices import all_slices, read_slice
from zeroflow.data.token_bytes import may_add_text, token_bytes
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.data.validation_sample import count_sample, draw_sample, target_bytes
from zeroflow.inference import scoring
from zeroflow.inference.evaluation import EvaluationConfig, TextScore
from zeroflow.inference.scoring import Request
from zeroflow.inference.trained import Trained
from zeroflow.model.llama import Llama
from zeroflow.training.job import TrainingJob
from zeroflow.training.validation import bits_per_byte, validation_loss

HELD_OUT = "held-out rows"
"""Name of the run's own rows for validation."""


class _Window(NamedTuple):
    """A piece of a document that is scored at once."""

    document: int
    request: Request
    text_bytes: float
    unknown: int


def corpora(config: EvaluationConfig) -> dict[str, CorpusConfig]:
    """Return the texts to score, by name.

    Raises:
        ValueError: there are no such files.
        hub.HubError: the hub refused or could not be reached.
    """
    found = {}
    for path in config.data_path:
        own = CorpusConfig(data_mode="files", data_path=(path,), text_column=config.text_column)
        # As for --evaluate-path, so that a text has one score wherever the command runs
        found[absolute(path)] = resolve_corpus(own).corpus
    if config.dataset:
        hub = CorpusConfig(
            data_mode="hub",
            dataset=config.dataset,
            dataset_config=config.dataset_config,
            text_column=config.text_column,
        )
        name = "/".join(filter(None, (config.dataset, config.dataset_config)))
        try:
            found[name] = resolve_corpus(hub).corpus
        except HubError as error:
            raise error.with_remedies(
                "`hf auth login` if it asks for an account",
                "`--data-path FILES` to score texts that you have",
            ) from error
    return found


def score_held_out(model: Llama, job: TrainingJob) -> TextScore:
    """Score the rows on which the run validates, in the same way as in training."""
    sample = draw_sample(job.shards, job.validation_rows)
    counts = count_sample(job.shards, job.tokenizer, sample)
    documents = sample.documents[:, 1:]
    rows, workload = Rows(job.shards, "validation"), job.training.workload
    loss = validation_loss(model, rows, sample.rows, workload, documents)
    bits = None
    if counts.text_bytes:
        sizes = target_bytes(job.shards, job.tokenizer, sample)
        assert sizes is not None
        scored = documents >= 0
        text_bytes = arrays.sums(documents[scored], sizes[scored])
        bits = scoring.ratio(loss.nats / math.log(2), text_bytes)
    return TextScore(
        text=HELD_OUT,
        revision=None,
        documents=counts.documents,
        tokens=counts.tokens,
        text_bytes=counts.text_bytes or 0,
        unknown=counts.unknown or 0,
        loss=loss.mean,
        loss_error=loss.standard_error,
        # Exactly as in training
        bpb=bits_per_byte(loss.mean, counts.bytes_per_token) if counts.bytes_per_token else None,
        bpb_error=bits and bits.error,
    )


def score_text(trained: Trained, name: str, corpus: CorpusConfig, *, most: int) -> TextScore:
    """Score the first documents of a resolved corpus, each by itself.

    As in training, a document follows an end-of-text token, and its end is scored too. A document
    that is longer than the context is scored in windows without overlap.

    Args:
        most: maximum number of tokens to score.

    Raises:
        ValueError: the corpus contains at most white space, or a file cannot be read.
    """
    documents, left, is_blank = 0, most, True
    windows: list[_Window] = []
    tokenizer = trained.tokenizer
    for text, ids in _documents(corpus, tokenizer):
        if left <= 0:
            break
        documents += 1
        is_blank = is_blank and not text.strip()
        found = [
            _Window(documents - 1, *window)
            for window in _windows(text, ids, tokenizer, context=trained.context, most=left)
        ]
        windows += found
        left -= sum(window.request.scored for window in found)
    if not windows:
        raise ValueError(f"{name} contains no text: name files with text")
    if is_blank:
        raise ValueError(f"{name} contains only white space: name files with text")
    scores = scoring.score(trained.model, [window.request for window in windows])
    # Documents are the sampled units, because the losses of the windows of one are correlated
    document = np.array([window.document for window in windows])
    nats = arrays.sums(document, [score.nats for score in scores])
    tokens = arrays.sums(document, [window.request.scored for window in windows])
    text_bytes = arrays.sums(document, [window.text_bytes for window in windows])
    loss = scoring.ratio(nats, tokens)
    bits = scoring.ratio(nats / math.log(2), text_bytes) if text_bytes.sum() else None
    return TextScore(
        text=name,
        revision=corpus.data_revision,
        documents=documents,
        tokens=int(tokens.sum()),
        text_bytes=round(text_bytes.sum()),
        unknown=sum(window.unknown for window in windows),
        loss=loss.value,
        loss_error=loss.error,
        bpb=bits and bits.value,
        bpb_error=bits and bits.error,
        most=most,
    )


def _documents(corpus: CorpusConfig, tokenizer: Tokenizer) -> Iterator[tuple[str, Int64Array]]:
    """Yield each document of a resolved corpus, and its ids."""
    encoder = tokenizer.load_encoder()
    for piece in all_slices(corpus):
        for batch in read_slice(corpus, piece, Tally()):
            ids, lengths = encoder.encode(batch.texts)
            found = np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
            yield from zip(batch.texts, found, strict=True)


def _windows(
    text: str, ids: Int64Array, tokenizer: Tokenizer, *, context: int, most: int
) -> Iterator[tuple[Request, float, int]]:
    """Yield the request, the bytes and the unknown tokens of each window of a document.

    Args:
        most: maximum number of tokens to score.
    """
    end, loaded = tokenizer.end_of_text, tokenizer.load()
    sequence = np.concatenate([[end], ids, [end]])
    begins = np.arange(len(ids) + 1) == 0
    sizes = token_bytes(loaded, sequence[1:], begins, end_of_text=end).astype(np.float64)
    if may_add_text(loaded):
        sizes *= min(1.0, arrays.well_formed(text)[1] / max(1.0, sizes.sum()))
    sequence, sizes = sequence[: most + 1], sizes[:most]
    unknown = sequence[1:] == encoding.unknown_id(loaded)
    for start in range(0, len(sizes), context):
        part = slice(start, start + context)
        request = Request(sequence[start : start + context + 1].tolist(), len(sizes[part]))
        yield request, float(sizes[part].sum()), int(np.sum(unknown[part]))
