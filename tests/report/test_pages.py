"""Pages with plots."""

import base64
import logging
import re

import pytest

from zeroflow.report.pages import Page, Plot, Table, TextBlock, never_fatal
from zeroflow.text.markup import Markdown, bold


def test_our_plots_are_put_into_a_page_and_those_that_a_text_names_are_not(tmp_path):
    for name in ("loss.png", "time.png", "secret.png"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    text = "![x](loss.png) ![x](secret.png) ![x](gone.png)"
    drawn = [Plot(tmp_path / name, name[:4]) for name in ("loss.png", "time.png")]
    page = Page((Markdown("# é"), *drawn, TextBlock(text)))
    found = re.findall(r"\]\(data:image/png;base64,([^)]+)\)", page.embedded)
    assert [base64.b64decode(data) for data in found] == [b"loss.png" * 100, b"time.png" * 100]
    assert page.embedded.endswith(f"\n{text}\n```")
    page.write(tmp_path / "page.md")
    linked = f"# é\n\n![loss](loss.png)\n\n![time](time.png)\n\n```text\n{text}\n```\n"
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == linked


def test_table_of_a_page_shows_text_literally_and_markup_as_such():
    table = Table(("", "loss"), [("*a|b*", bold("4.2"))], right=" r")
    assert Page((table,)).linked.splitlines() == [
        "|  | loss |",
        "| --- | ---: |",
        r"| \*a\|b\* | **4.2** |",
    ]


def test_page_that_fails_is_a_warning(tmp_path, caplog):
    missing = Page((Plot(tmp_path / "gone.png", "gone"),))
    with caplog.at_level(logging.WARNING, logger="zeroflow"), never_fatal("report"):
        assert missing.embedded
    [message] = caplog.messages
    assert message.startswith("cannot show the report: FileNotFoundError: ")
    with pytest.raises(KeyboardInterrupt), never_fatal("report"):
        raise KeyboardInterrupt
