"""The page of a run's data: data.md."""

from pathlib import Path

import numpy as np

from zeroflow.data import statistics
from zeroflow.data.arrays import Int64Array
from zeroflow.data.shards import ShardSet, SplitCounts
from zeroflow.data.statistics import ShardStatistics
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.report import pictures
from zeroflow.report.pages import quoted
from zeroflow.run_folder import RunFolder


def write_data(shards: ShardSet, tokenizer: Tokenizer, folder: RunFolder) -> Path:
    """Write a page about a run's data, with a picture, into its folder.

    Returns:
        the path of data.md
    """
    gathered = statistics.gather(shards, tokenizer)
    folder.path.mkdir(parents=True, exist_ok=True)
    pictures.document_lengths(
        gathered.lengths, folder.lengths_picture, row_tokens=shards.row_tokens
    )
    text = markdown(shards, gathered, tokenizer, picture=folder.lengths_picture.name)
    folder.data_page.write_text(text, encoding="utf-8")
    return folder.data_page


def markdown(
    shards: ShardSet, gathered: ShardStatistics, tokenizer: Tokenizer, *, picture: str
) -> str:
    """Return the page as Markdown.

    Args:
        picture: address of the picture of document lengths.
    """
    source = ", ".join(f"{name} {value}" for name, value in gathered.source.items() if value)
    rows = {
        "Source": source,
        "Tokenizer": f"{gathered.tokenizer}, {tokenizer.vocab_size:,} tokens, "
        f"encoded by {tokenizer.encoder}",
        "Parts": f"{shards.parts}, rows of {shards.row_tokens:,} tokens, in `{shards.path}`",
        "Left out": f"{shards.empty_documents:,} empty, {shards.duplicates:,} duplicates, "
        f"{shards.bad_lines:,} bad lines",
        "Document length": _quantiles(gathered.lengths),
    }
    if gathered.tokens_per_second and gathered.text_bytes_per_second:
        rows["Built here at"] = (
            f"{gathered.tokens_per_second / 1e6:,.2f}M tokens/s, "
            f"{gathered.text_bytes_per_second / 1e6:,.1f} MB of text/s"
        )
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    counts = "\n".join(
        f"| {name} | {of_train} | {of_validation} |"
        for name, of_train, of_validation in zip(
            _COUNTS, _counts(shards.train), _counts(shards.validation), strict=True
        )
    )
    samples = "\n\n".join(map(quoted, gathered.samples))
    return (
        f"# Data: {shards.path.name}\n\n| | |\n|---|---|\n{facts}\n\n"
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


def _quantiles(lengths: Int64Array) -> str:
    shares = (0.0, 0.1, 0.5, 0.9, 1.0)
    names = ("minimum", "10 %", "median", "90 %", "maximum")
    values = np.quantile(lengths, shares, method="nearest")
    found = ", ".join(f"{n} {int(v):,}" for n, v in zip(names, values, strict=True))
    return f"{found}; mean {lengths.mean():,.0f} tokens"
