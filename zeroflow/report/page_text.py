"""Conversion of Markdown pages to HTML, and to text for a terminal."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from zeroflow.report.pages import data_uri

_BULLET = "- "

_OWN_PLOT = re.compile(r"[\w-]+\.png")
"""Address of a plot beside the page."""

# The policy allows only embedded images, so that text of documents cannot load anything
_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; color: #222; background: #fff; max-width: 60em; margin: 1.5em; }}
table {{ border-collapse: collapse; }}
thead:not(:has(th:not(:empty))) {{ display: none; }}
td:first-child {{ white-space: nowrap; }}
th, td {{ border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left; vertical-align: top; }}
pre {{ background: #f4f4f4; padding: 0.6em; white-space: pre-wrap; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
{body}</body>
</html>
"""


def as_html(page: Path, title: str) -> str:
    """Return a page as a single HTML file, which needs no other file and no network.

    Plots beside the page are embedded. Text of documents is escaped when the page is written,
    so it cannot refer to an image.
    """
    parser = _parser()
    tokens = parser.parse(page.read_text(encoding="utf-8"))
    for child in (child for token in tokens for child in token.children or ()):
        name = str(child.attrGet("src"))
        is_ours = child.type == "image" and _OWN_PLOT.fullmatch(name)
        if is_ours and (plot := page.parent / name).exists():
            child.attrSet("src", data_uri(plot))
    body = parser.renderer.render(tokens, parser.options, {})
    return _HTML.format(title=escape(title), body=body)


def as_text(markdown: str, width: int | None = None) -> str:
    """Return a page as plain text, without its images.

    Args:
        width: columns of the terminal. A wider table is split into several, each with the first
            column; None for no limit.
    """
    blocks: list[str] = []
    rows: list[list[str]] = []
    right: list[bool] = []
    before = ""
    in_table = False
    for token in _parser().parse(markdown):
        match token.type:
            case "table_open":
                rows, right, in_table = [], [], True
            case "table_close":
                blocks += _tables(rows, right, width)
                in_table = False
            case "tr_open":
                rows.append([])
            case "th_open":
                right.append("right" in str(token.attrGet("style")))
            case "list_item_open":
                before = _BULLET
            case "inline" if in_table:
                rows[-1].append(_inline(token))
            case "inline":
                text = before + _inline(token).strip()
                if before and blocks and blocks[-1].startswith(before):
                    blocks[-1] += f"\n{text}"
                elif text:  # empty for an image
                    blocks.append(text)
                before = ""
            case "heading_close" if blocks:
                blocks[-1] += f"\n{'-' * len(blocks[-1])}"
            case "fence":
                blocks.append(token.content.rstrip())
    return "\n\n".join(blocks)


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _inline(token: Token) -> str:
    parts: list[str] = []
    address = ""
    for child in token.children or ():
        match child.type:
            case "text" | "code_inline":
                parts.append(child.content)
            case "softbreak" | "hardbreak":
                parts.append(" ")
            case "link_open":
                address = str(child.attrGet("href"))
            case "link_close":
                parts.append(f" {address}")
    return "".join(parts)


def _tables(
    rows: Sequence[Sequence[str]], right: Sequence[bool], width: int | None
) -> Iterator[str]:
    """Yield a table as aligned columns, split into several if it is wider than `width`.

    A column that is too wide by itself does not start a new table.
    """
    if not any(rows[0]):
        rows = rows[1:]  # a table of facts has an empty header
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns, used = [0], widths[0]
    for column in range(1, len(widths)):
        wide, alone = used + 2 + widths[column], widths[0] + 2 + widths[column]
        if width and wide > width >= alone and len(columns) > 1:
            yield _aligned(rows, right, columns, widths)
            columns, wide = [0], alone
        columns.append(column)
        used = wide
    yield _aligned(rows, right, columns, widths)


def _aligned(
    rows: Sequence[Sequence[str]],
    right: Sequence[bool],
    columns: Sequence[int],
    widths: Sequence[int],
) -> str:
    sides = [">" if right[column] else "<" for column in columns]
    return "\n".join(
        "  ".join(
            f"{row[n]:{side}{widths[n]}}" for n, side in zip(columns, sides, strict=True)
        ).rstrip()
        for row in rows
    )
