"""Markdown of the pages, which no text of a user breaks."""

import base64
import re

from zeroflow.report.pages import quoted, table_cell, with_pictures


def test_pictures_of_a_page_are_put_into_it(tmp_path):
    content = {name: name.encode() * 100 for name in ("loss.png", "time-1.png")}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    page = tmp_path / "report.md"
    page.write_text("# é\n![loss](loss.png) ![time](time-1.png) ![loss](loss.png)\n[x](other.md)")
    text = with_pictures(page)
    found = re.findall(r"\]\(data:image/png;base64,([^)]+)\)", text)
    assert [base64.b64decode(data) for data in found] == [
        content[name] for name in ("loss.png", "time-1.png", "loss.png")
    ]
    assert text.startswith("# é\n![loss](data:") and text.endswith("[x](other.md)")
    assert "(loss.png)" in page.read_text(), "the page itself stays as it is"


def test_cell_of_a_table_stays_one_cell_of_one_line():
    assert table_cell("a|b\nc|") == "a\\|b c\\|"
    cells = re.split(r"(?<!\\)\|", f"| {table_cell('x | y')} | z |")
    assert len(cells) == 4, "two cells between three bars"


def test_quoted_text_ends_where_it_ends():
    text = "print('|')\n```\n# no heading\n````"
    block = quoted(text)
    lines = block.split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert fences == [0, len(lines) - 1], "no line of the text closes the block"
    assert "# no heading" in lines[1:-1]
