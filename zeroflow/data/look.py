"""A look at the rows that a run reads: what they are made of, and what became of the documents."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zeroflow import artifacts
from zeroflow.data import parts, shards, tokenizer
from zeroflow.data.packing import Ids
from zeroflow.data.parts import SplitCounts
from zeroflow.data.shards import Rows, ShardSet
from zeroflow.data.tokenizer import TokenizerFiles

_SAMPLES = 3
_SAMPLE_TOKENS = 80


class Look(NamedTuple):
    source: dict[str, Any]
    """What the documents depend on: source, revision and the like."""

    tokenizer: str
    lengths: Ids
    """Tokens of every training document, its end of text included."""

    samples: list[str]
    """Beginnings of a few rows spread over the training split, decoded."""

    tokens_per_second: float | None
    """While parts were built on this machine; None if none was."""

    text_bytes_per_second: float | None


def look(built: ShardSet, tokens: TokenizerFiles) -> Look:
    """Gather what is known of a shard set, from its manifests, tables and rows."""
    plan = artifacts.read_signed(built.path / shards.PLAN)
    times = [line for line in shards.build_times(built.path) if line["part"] < built.parts]
    seconds = sum(line["seconds"] for line in times)
    return Look(
        source=plan["identity"]["corpus"],
        tokenizer=plan["tokenizer"],
        lengths=np.concatenate([_document_lengths(path) for path in built.part_paths]),
        samples=_samples(Rows(built, "train"), tokens),
        tokens_per_second=sum(t["tokens"] for t in times) / seconds if times else None,
        text_bytes_per_second=sum(t["text_bytes"] for t in times) / seconds if times else None,
    )


def quoted(text: str) -> str:
    """A block of Markdown, which no text ends."""
    return f"```text\n{text.replace('```', '` ` `')}\n```"


def markdown(built: ShardSet, seen: Look, tokens: TokenizerFiles, *, picture: str) -> str:
    """A page about the data; `picture` is the address of the picture of lengths."""
    source = ", ".join(f"{name} {value}" for name, value in seen.source.items() if value)
    rows = {
        "Source": source,
        "Tokenizer": f"{seen.tokenizer}, {tokens.vocab_size:,} tokens, encoded by {tokens.encoder}",
        "Parts": f"{built.parts}, rows of {built.row_tokens:,} tokens, in `{built.path}`",
        "Left out": f"{built.empty_documents:,} empty, {built.duplicates:,} duplicates, "
        f"{built.bad_lines:,} bad lines",
        "Document length": _quantiles(seen.lengths),
    }
    if seen.tokens_per_second and seen.text_bytes_per_second:
        rows["Built here at"] = (
            f"{seen.tokens_per_second / 1e6:,.2f}M tokens/s, "
            f"{seen.text_bytes_per_second / 1e6:,.1f} MB of text/s"
        )
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    counts = "\n".join(
        f"| {name} | {of_train} | {of_validation} |"
        for name, of_train, of_validation in zip(
            _COUNTS, _counts(built.train), _counts(built.validation), strict=True
        )
    )
    samples = "\n\n".join(map(quoted, seen.samples))
    return (
        f"# Data: {built.path.name}\n\n| | |\n|---|---|\n{facts}\n\n"
        f"| | training | validation |\n|---|---|---|\n{counts}\n\n"
        f"![tokens of the documents]({picture})\n\n## Beginnings of rows\n\n{samples}\n"
    )


_COUNTS = (
    "rows",
    "documents",
    "tokens",
    "UTF-8 bytes",
    "bytes per token",
    "padding",
    "documents in more than one row",
)


def _counts(split: SplitCounts) -> list[str]:
    stored = split.document_tokens + split.padding_tokens
    return [
        f"{split.rows:,}",
        f"{split.documents:,}",
        f"{split.document_tokens:,}",
        f"{split.text_bytes:,}",
        f"{split.text_bytes / split.document_tokens:.3f}" if split.text_bytes else "none",
        f"{split.padding_tokens:,} ({split.padding_tokens / stored:.2%})",
        f"{split.cut_documents:,} ({split.cut_documents / split.documents:.1%})",
    ]


def _quantiles(lengths: Ids) -> str:
    shares = (0.0, 0.1, 0.5, 0.9, 1.0)
    names = ("least", "10 %", "median", "90 %", "most")
    values = np.quantile(lengths, shares, method="nearest")
    found = ", ".join(f"{n} {int(v):,}" for n, v in zip(names, values, strict=True))
    return f"{found}; mean {lengths.mean():,.0f} tokens"


def _document_lengths(part: Path) -> Ids:
    table = pq.read_table(part / parts.DOCUMENTS, columns=["split", "start", "tokens"])
    table = table.filter(pc.equal(table["split"], "train"))
    starts = table["start"].to_numpy()
    tokens = table["tokens"].to_numpy().astype(np.int64)
    # the pieces of a document follow each other, and its first starts at 0
    return np.add.reduceat(tokens, np.flatnonzero(starts == 0)) if len(tokens) else tokens


def _samples(rows: Rows, tokens: TokenizerFiles) -> list[str]:
    places = np.linspace(0, len(rows), min(_SAMPLES, len(rows)), endpoint=False, dtype=np.int64)
    beginnings = [row[:_SAMPLE_TOKENS].tolist() for row in rows[places]]
    if tokens.path is None:
        return [" ".join(map(str, ids)) for ids in beginnings]
    loaded = tokenizer.load(tokens)
    return [loaded.decode(ids, skip_special_tokens=False) for ids in beginnings]
