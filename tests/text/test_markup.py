"""Text from outside is shown literally, on pages and in terminals."""

import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from zeroflow.text.markup import (
    LineFormatter,
    Markdown,
    block,
    bold,
    code,
    escaped,
    link,
    one_line,
    shell_command,
    table,
    visible,
)

READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
TEXTS = st.text(st.sampled_from("\\`*_{}[]()<>#+-.!|~&$;\"'=x1é\n\r\t \x1b\x9b"), max_size=40)


def inline(markdown: str) -> list[tuple[str, str]]:
    """Type and content of all tokens within lines."""
    return [
        (child.type, child.content)
        for token in READER.parse(markdown)
        for child in token.children or ()
    ]


def read(markdown: str) -> str:
    """What a reader sees of a line in which nothing is markup."""
    parts = inline(markdown)
    assert {kind for kind, _ in parts} <= {"text", "text_special"}, parts
    return "".join(content for _, content in parts)


@given(TEXTS)
def test_each_character_of_a_text_is_shown_literally(text):
    assert read(f"x {escaped(text)} x").split() == f"x {one_line(text)} x".split()


@given(TEXTS, TEXTS)
def test_cell_keeps_its_text_and_a_row_its_cells(first, second):
    tokens = READER.parse(table(("a", "b"), [(first, second)]))
    cells = [token.content for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    for text, cell in zip((first, second), cells[2:], strict=True):
        shown = f"x{one_line(text).strip()}x"
        assert read(f"x{cell}x").split() == shown.split()


@given(TEXTS)
def test_code_within_a_line_is_code(text):
    [(kind, content)] = inline(code(f"a{text}"))
    assert (kind, content.rstrip()) == ("code_inline", one_line(f"a{text}").rstrip())


@given(TEXTS)
def test_text_cannot_end_its_block(text):
    [token] = READER.parse(block(text))
    assert token.type == "fence"
    assert token.content == visible(text).replace("\r\n", "\n") + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "![logo](logo.png)",
        "<script>alert(1)</script><img src=x onerror=alert(1)>",
        "[x](javascript:alert(1)) &lt; <https://example.org>",
        "a | b \\| c",
        "~~x~~ **x** _x_ `x` $x$",
        "# x\n---\n- x",
    ],
)
def test_markup_that_a_text_quotes_is_shown(text):
    assert read(f"x {escaped(text)}") == f"x {one_line(text)}"


def test_names_with_underscores_look_the_same_in_the_file():
    assert escaped("training.max_steps a__b _c_") == "training.max_steps a\\_\\_b \\_c\\_"


def test_our_own_markup_is_kept():
    assert bold(code("a*b")) == "**`a*b`**"
    assert inline(link("a]b", "c.md"))[0][0] == "link_open"
    assert table(("a",), [(Markdown("**x**"),)], right="r") == "| a |\n| ---: |\n| **x** |"


def test_control_characters_are_visible_and_nothing_else_changes():
    harmless = "é 漢字 🙂 👩\u200d👩\u200d👧 \u05d0\u200f\ta\r\nb\n"
    assert visible(harmless) == harmless
    assert visible("\x1b[31m\x9b\x07\x7f\rb\u202e\u2066\u2028") == (
        "\\u001b[31m\\u009b\\u0007\\u007f\\u000db\\u202e\\u2066\\u2028"
    )
    assert visible("\udc80").encode() == b"\\udc80"
    assert one_line("a\nb\r\nc\td") == "a b c d"


def test_command_for_a_shell_gives_the_same_words():
    words = ["zeroflow", "--prompt=a \x1b[1m'b' \\ $x\nc", "--data-path=ä b*.txt", "plain", ""]
    command = shell_command(words)
    assert "\x1b" not in command and "plain" in command
    ended = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split("\0")[:-1] == words


@given(TEXTS)
def test_visible_json_is_the_same_json(text):
    line = json.dumps({"id": f"{text}\udc80"}, ensure_ascii=False)
    assert json.loads(visible(line)) == {"id": f"{text}\udc80"}


def test_log_line_has_no_control_characters():
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "%s\nand", ("\x1b[2J.txt",), None)
    assert LineFormatter("%(message)s").format(record) == "\\u001b[2J.txt\nand"


def test_log_line_and_its_traceback_have_no_password():
    address = "http://me:s3cret@box"
    try:
        raise ConnectionError(address)
    except ConnectionError:
        place = ("x", logging.ERROR, "x.py", 1)
        record = logging.LogRecord(*place, "at %s", (address,), sys.exc_info())
    text = LineFormatter("%(message)s").format(record)
    assert "s3cret" not in text and text.count("http://***@box") == 2
