"""TODO docstring."""

import base64
import re
from pathlib import Path


def with_pictures(page: Path) -> str:
    """A markdown page with its pictures inside, for readers who cannot reach the files."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\]\(([\w.-]+\.png)\)", text)):
        data = base64.b64encode((page.parent / name).read_bytes()).decode()
        text = text.replace(f"]({name})", f"](data:image/png;base64,{data})")
    return text


def table_cell(text: str) -> str:
    """`text` in a table, where a bar or a line break of its own would end it."""
    return text.replace("|", "\\|").replace("\n", " ")


def quoted(text: str) -> str:
    """A block of Markdown, which no text ends."""
    return f"```text\n{text.replace('```', '` ` `')}\n```"
