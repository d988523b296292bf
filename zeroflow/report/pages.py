"""Markdown that any text and picture of a run fits into."""

import base64
import re
from pathlib import Path


def with_pictures(page: Path) -> str:
    """A Markdown page with its pictures embedded, for readers who cannot reach the files."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\]\(([\w.-]+\.png)\)", text)):
        data = base64.b64encode((page.parent / name).read_bytes()).decode()
        text = text.replace(f"]({name})", f"](data:image/png;base64,{data})")
    return text


def table_cell(text: str) -> str:
    """`text` as a cell of a table: its bars are escaped, its line breaks are spaces."""
    return text.replace("|", "\\|").replace("\n", " ")


def quoted(text: str) -> str:
    """`text` as a block of Markdown, whose end no part of the text can be."""
    return f"```text\n{text.replace('```', '` ` `')}\n```"
