"""Escaping of text for Markdown pages, log lines and terminals.

Texts and ids of documents, file names, prompts, samples and messages are untrusted. Control
characters are shown as escapes, so that no terminal executes them, and in Markdown each character
is shown literally. Only strings of type `Markdown` are markup; every other string on a page is
escaped.
"""

import logging
import re
import shlex
from collections.abc import Iterable, Sequence

from zeroflow.text.redaction import redacted

# All control characters except tab and line feed, Unicode's line ends, overrides of the writing
# direction, and lone surrogates, which cannot be encoded as UTF-8
_CONTROLS = re.compile(
    r"\r(?!\n)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

# Markup within a line. An underscore between letters or digits is not markup
_SPECIAL = re.compile(r"[\\`*\[\]<&~$]|(?<![^\W_])_|_(?![^\W_])")


class Markdown(str):
    """Markdown, in which all text from outside is escaped."""

    __slots__ = ()


def is_utf8(text: str) -> bool:
    """Return False for text with lone surrogates, which Python uses for undecodable arguments."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def visible(text: str) -> str:
    """Return `text` with control characters as escapes, as in JSON; line ends and tabs stay."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shell_command(words: Iterable[str]) -> str:
    """Return a command to paste into a shell, with control characters as escapes."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    if not _CONTROLS.search(word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{visible(escaped)}'"


def one_line(text: str) -> str:
    """Return `text` on one line: line ends and tabs become spaces."""
    return re.sub(r"\r?\n|\t", " ", visible(text))


def shortened(text: str, most: int) -> str:
    """Return `text` on one line of at most `most` characters."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def escaped(text: str) -> Markdown:
    """Return `text` on one line of Markdown that shows each character literally."""
    if isinstance(text, Markdown):
        return text
    return Markdown(_SPECIAL.sub(r"\\\g<0>", one_line(text)))


def bold(text: str) -> Markdown:
    return Markdown(f"**{escaped(text)}**")


def code(text: str) -> Markdown:
    """Return `text` as inline code."""
    line = one_line(text)
    ticks = "`" * (_longest_run(line, "`") + 1)
    space = " " if "`" in line[:1] + line[-1:] else ""
    return Markdown(f"{ticks}{space}{line}{space}{ticks}")


def block(text: str) -> Markdown:
    """Return `text` as a code block that the text itself cannot close."""
    fence = "`" * max(3, _longest_run(text, "`") + 1)
    return Markdown(f"{fence}text\n{visible(text)}\n{fence}")


def link(text: str, address: str) -> Markdown:
    """Return a link to `address`, which must be trusted."""
    return Markdown(f"[{escaped(text)}]({address})")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> Markdown:
    """Return a table.

    Args:
        right: a character for each column; "r" aligns it on the right.
    """
    rule = ["---:" if side == "r" else "---" for side in right.ljust(len(head), "l")]
    lines = [_row(map(_cell, head)), _row(rule)]
    return Markdown("\n".join([*lines, *(_row(map(_cell, row)) for row in rows)]))


def _cell(text: str) -> str:
    return escaped(text).replace("|", "\\|").replace("\n", " ")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _longest_run(text: str, character: str) -> int:
    return max(map(len, re.findall(f"{re.escape(character)}+", text)), default=0)


SHOWN_AT_THE_END = {"shown_at_the_end": True}
"""`extra` of a log record that the terminal leaves out: the command prints it at its end."""


def is_for_now(record: logging.LogRecord) -> bool:
    """Return False for a record with `SHOWN_AT_THE_END`."""
    return not getattr(record, "shown_at_the_end", False)


class LineFormatter(logging.Formatter):
    """Formats log lines with control characters escaped and passwords hidden."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(visible(super().format(record)))
