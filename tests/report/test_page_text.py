"""Pages as HTML and as text for a terminal."""

import base64

from zeroflow.report.page_text import as_html, as_text
from zeroflow.report.pages import Page, Plot
from zeroflow.text.markup import Markdown, block, bold, code, escaped, link, table

HEAD = ("run", "loss", "what was found")
ROWS = [("s|mall", "3.25", "a*b_c"), ("tiny", "10.5", "<b>x</b>")]


def test_terminal_shows_text_without_markup():
    page = Page(
        (
            Markdown("# Sweep s\\_1"),
            Markdown(f"{bold('2 runs')}; see {code('a|b')} and {link('this', 'http://x/#/a')}."),
            table(HEAD, ROWS, right=" r"),
            Markdown("- one\n- two"),
            table(("", ""), [("Model", "tiny")]),
            block("# not a heading\n![x](y.png)"),
        )
    )
    assert as_text(page.linked).splitlines() == [
        "Sweep s_1",
        "---------",
        "",
        "2 runs; see a|b and this http://x/#/a.",
        "",
        "run     loss  what was found",
        "s|mall  3.25  a*b_c",
        "tiny    10.5  <b>x</b>",
        "",
        "- one",
        "- two",
        "",
        "Model  tiny",
        "",
        "# not a heading",
        "![x](y.png)",
    ]


def test_table_that_is_too_wide_for_a_terminal_is_cut_into_several():
    shown = as_text(table(HEAD, ROWS, right=" r"), width=23)
    assert shown.splitlines() == [
        "run     loss",
        "s|mall  3.25",
        "tiny    10.5",
        "",
        "run     what was found",
        "s|mall  a*b_c",
        "tiny    <b>x</b>",
    ]
    assert as_text(table(HEAD, ROWS, right=" r"), width=28).count("\n") == 2
    assert as_text(table(HEAD, ROWS), width=5).count("\n") == 2, "no cut would help"


def test_html_needs_no_other_file_and_runs_nothing(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"\x89PNG loss")
    parts = (
        Markdown("# first"),
        Plot(tmp_path / "loss.png", "loss"),
        table(HEAD, ROWS),
        escaped("![x](http://elsewhere/x.png) <script>alert(1)</script>"),
    )
    Page(parts).write(tmp_path / "report.md")
    html = as_html(tmp_path / "report.md", "run <first>")
    data = base64.b64encode(b"\x89PNG loss").decode()
    assert f'<img src="data:image/png;base64,{data}" alt="loss"' in html
    assert "<title>run &lt;first&gt;</title>" in html and "<td>s|mall</td>" in html
    above = tmp_path / "inner" / "page.md"
    above.parent.mkdir()
    above.write_text("![x](../loss.png) ![x](gone.png)")
    assert "data:image" not in as_html(above, "x").partition("<body>")[2], "only from its folder"
    assert html.count("<img") == 1 and "<script" not in html and "<b>" not in html
    assert "default-src 'none'" in html
