"""Tokenised documents of a slice: encoded from text, or generated as token ids."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from zeroflow.data import arrays, encoding, synthetic
from zeroflow.data.arrays import Int64Array, TokenArray
from zeroflow.data.documents import Tally
from zeroflow.data.duplicates import hash_texts
from zeroflow.data.part_job import PartJob
from zeroflow.data.read_ahead import read_ahead
from zeroflow.data.returned_text import Excerpts
from zeroflow.data.slices import read_slice
from zeroflow.data.token_batches import DocumentColumns, TokenBatch, end_to_end


def tokenize(job: PartJob, tally: Tally) -> Iterator[TokenBatch]:
    """The tokenised documents of the job's slice, in order.

    Args:
        tally: counts the documents that are left out, and gets the sample of lost text at the end.

    Raises:
        ValueError: a file cannot be read, or the tokenizer gives invalid ids.
        hub.HubError: the hub failed.
    """
    return _from_text(job, tally) if job.corpus.is_text else _synthetic(job)


def _from_text(job: PartJob, tally: Tally) -> Iterator[TokenBatch]:
    encoder, excerpts = job.tokenizer.load_encoder(), Excerpts()
    split = map(job.holdout.apply, read_slice(job.corpus, job.piece, tally))
    for read, held_out, ends in read_ahead(split):
        ids, lengths = encoder.encode(read.texts)
        excerpts.add(read.texts)
        _require_valid(job, ids, lengths, read.ids)
        count = len(lengths)
        documents = DocumentColumns(
            read.ids,
            read.urls,
            np.arange(count),
            read.text_bytes,
            held_out,
            ends,
            hash_texts(read.texts) if job.corpus.deduplicate else np.zeros(count, np.uint64),
            lengths + 1,
        )
        batch = TokenBatch(documents, ids, np.cumsum(lengths) - lengths)
        if not lengths.all():  # a tokenizer may encode a text to no tokens
            tally.empty += int(((lengths == 0) & ~ends).sum())
            batch = batch.choose(lengths > 0)
        yield batch
    tally.returned = excerpts.measure(encoder)


def _require_valid(
    job: PartJob, ids: TokenArray, lengths: Int64Array, documents: pa.BinaryArray
) -> None:
    """Check that all ids are in the vocabulary, and that none is the end-of-text id.

    In rows, end-of-text ids separate the documents, so a document must not contain one.
    """
    end_of_text, vocab_size = job.tokenizer.end_of_text, job.tokenizer.vocab_size
    highest = ids.max(initial=0)
    if highest < vocab_size and (highest < end_of_text or not (ids == end_of_text).any()):
        return
    place = int(((ids >= vocab_size) | (ids == end_of_text)).argmax())
    number = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
    document = arrays.well_formed_strings(documents[number : number + 1])[0].as_py()
    if ids[place] == end_of_text == encoding.unknown_id(job.tokenizer.load()):
        raise ValueError(
            f"document {document} contains text that the tokenizer does not know, and its unknown "
            "token is also the token that ends documents: set another with --end-of-text, or use "
            "another tokenizer"
        )
    if ids[place] == end_of_text:
        raise ValueError(
            f"document {document} spells out the token that ends documents, and this "
            "tokenizer encodes it as that token: set another with --end-of-text, or use "
            "another tokenizer"
        )
    raise ValueError(
        f"{job.tokenizer.path} gave id {ids[place]} for document {document}, but its "
        f"vocabulary has {vocab_size} tokens: its tokenizer.json is wrong"
    )


def _synthetic(job: PartJob) -> Iterator[TokenBatch]:
    assert job.piece.stop is not None
    for number in range(job.piece.start, job.piece.stop):
        block = synthetic.generate_block(job.tokenizer.vocab_size, job.seed, number)
        lengths = np.array([len(tokens) for tokens in block.tokens], dtype=np.int64)
        ids = [name.encode() for name in block.ids]
        documents = DocumentColumns(
            arrays.binary(ids),
            arrays.strings([""] * len(lengths)),
            np.arange(len(lengths)),
            np.zeros(len(lengths), dtype=np.int64),
            job.holdout.positions(ids, ()) < job.holdout.below,
            np.zeros(len(lengths), dtype=bool),
            np.zeros(len(lengths), dtype=np.uint64),
            lengths,
        )
        yield end_to_end(documents, [tokens[:-1] for tokens in block.tokens])
