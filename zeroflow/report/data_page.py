"""The page of a run's data: data.md."""

import logging
from pathlib import Path

import numpy as np

from zeroflow import artifacts
from zeroflow.data.arrays import Int64Array
from zeroflow.data.shards import ShardSet, SplitCounts
from zeroflow.data.statistics import ShardStatistics
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.report import plots
from zeroflow.report.pages import Page, Plot, Table, TextBlock
from zeroflow.run_folder import RunFolder
from zeroflow.text.markup import Markdown, code, escaped
from zeroflow.units import count

log = logging.getLogger(__name__)


def write_data(
    shards: ShardSet, gathered: ShardStatistics, tokenizer: Tokenizer, folder: RunFolder
) -> Page:
    """Write data.md, the page about a run's data, and its plot into the run's folder.

    If the folder is read-only, the page is only returned.
    """
    made = page(shards, gathered, tokenizer, plot=folder.lengths_plot)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        plots.document_lengths(gathered.lengths, folder.lengths_plot, row_tokens=shards.row_tokens)
        made.write(folder.data_page)
    except OSError as error:
        log.warning("cannot write the page of the data: %s", artifacts.explained(error))
    return made


def page(shards: ShardSet, gathered: ShardStatistics, tokenizer: Tokenizer, *, plot: Path) -> Page:
    """Return the page.

    Args:
        plot: file of the plot of document lengths.
    """
    facts = {name: value for name, value in gathered.source.items() if value}
    source = ", ".join(
        str(value) if name == "source" else f"{name} {value}" for name, value in facts.items()
    )
    rows = {
        "Source": source,
        "Tokenizer": f"{gathered.tokenizer}, {tokenizer.vocab_size:,} tokens, "
        f"encoded by {tokenizer.encoder}",
        "Parts": Markdown(
            f"{shards.parts}, rows of {shards.row_tokens:,} tokens, in {code(str(shards.path))}"
        ),
        "Left out": f"{count(shards.empty_documents, 'empty document')}, "
        f"{count(shards.duplicates, 'duplicate')}, "
        f"{count(shards.bad_lines, 'bad line')}",
        "Document length": _quantiles(gathered.lengths)
        + (f" (in {gathered.parts} of the parts)" if gathered.parts < shards.parts else ""),
    }
    if ends := shards.held_out_ends:
        cut = "its end is" if ends == 1 else "their ends are"
        rows["In both splits"] = f"{count(ends, 'document')}: {cut} held out"
    if gathered.tokens_per_second and gathered.text_bytes_per_second:
        rows["Build speed"] = (
            f"{gathered.tokens_per_second / 1e6:,.2f}M tokens/s, "
            f"{gathered.text_bytes_per_second / 1e6:,.1f} MB of text/s"
        )
    splits = _counts(shards.train), _counts(shards.validation)
    return Page(
        (
            Markdown(f"# Data: {escaped(shards.path.name)}"),
            Table(("", ""), rows.items()),
            Table(("", "training", "validation"), list(zip(_COUNTS, *splits, strict=True))),
            Plot(plot, "histogram of document lengths"),
            Markdown("## Beginnings of rows"),
            *map(TextBlock, gathered.samples),
        )
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
