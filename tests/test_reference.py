"""The tables of docs/reference/ match the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference_tables

from zeroflow.data import document_table
from zeroflow.run_folder import Cache
from zeroflow.settings import flags
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "reference").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_is_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert reference_tables.updated(text) == text, "run `make reference`"


def test_every_table_is_on_a_page():
    shown = [name for page in PAGES for name in reference_tables.names(page.read_text("utf-8"))]
    assert sorted(shown) == sorted(reference_tables.TABLES)


def test_old_table_is_replaced_and_the_text_around_it_kept():
    page = "before\n<!-- table: ui -->\nof before\n<!-- end -->\nafter\n"
    updated = reference_tables.updated(page)
    assert updated.startswith("before\n") and updated.endswith("after\n")
    assert "| `--mlflow-port` | integer ≥ 1 and ≤ 65,535 | `5000` |" in updated
    assert "of before" not in updated and reference_tables.updated(updated) == updated
    with pytest.raises(KeyError, match="nothing"):
        reference_tables.updated(page.replace("ui", "nothing"))


def test_every_setting_of_a_run_and_a_sweep_has_its_row():
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[\w-]+)` \|", page, re.MULTILINE)
    for config in (RunConfig, SweepConfig):
        for setting in flags.settings(config):
            assert setting.flag in rows


CACHE = Cache(Path("cache"))


@pytest.mark.parametrize("folder", [CACHE, CACHE.run("run"), CACHE.sweep("sweep")])
def test_every_file_of_the_cache_is_on_its_page(folder):
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    for name in dir(folder):
        if isinstance(file := getattr(folder, name), Path) and not name.endswith("_lock"):
            assert f"`{file.name}" in page or name == "path", name


def test_columns_of_the_table_of_documents_are_on_the_page_of_files():
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    _, table = page.split("| column of `documents.parquet` |")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", table.split("\n\n")[0], re.MULTILINE)
    assert rows == [(field.name, str(field.type)) for field in document_table.SCHEMA]


def test_messages_on_the_page_of_failures_are_in_the_code():
    page = (DOCS / "reference" / "failures.md").read_text(encoding="utf-8")
    seen = [line.split(" | ")[1] for line in page.splitlines() if line.count(" | ") == 3]
    quotes = [quote for cell in seen for quote in re.findall(r"`([^`]+)`", cell)]
    messages = [quote for quote in quotes if not quote.startswith(("--", "zeroflow "))]
    assert len(messages) > 10
    in_code = "\n".join(strings_of_the_code())
    for message in messages:
        assert all(part in in_code for part in message.split("…")), message


def strings_of_the_code() -> Iterator[str]:
    for file in (DOCS.parent / "zeroflow").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value for v in node.values if isinstance(v, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
