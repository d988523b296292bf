"""Markdown helpers for the texts and pictures of a run."""

import base64
import re
from pathlib import Path


def with_pictures(page: Path) -> str:
    """Return a Markdown page with embedded pictures, for readers without access to the files."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\]\(([\w.-]+\.png)\)", text)):
        data = base64.b64encode((page.parent / name).read_bytes()).decode()
        text = text.replace(f"]({name})", f"](data:image/png;base64,{data})")
    return text


def table_cell(text: str) -> str:
    """Format `text` as a table cell: bars are escaped, and line breaks become spaces."""
    return text.replace("|", "\\|").replace("\n", " ")


def quoted(text: str) -> str:
    """Format `text` as a Markdown code block that the text itself cannot close."""
    return f"```text\n{text.replace('```', '` ` `')}\n```"
