"""The `zeroflow` command."""

import pytest

from zeroflow.cli import commands
from zeroflow.data.provenance import Piece


@pytest.mark.parametrize("command", [["generate"], ["export", "--out", "out"]])
def test_command_for_a_run_that_is_not_there_says_so(console, capsys, tmp_path, command):
    argv = [*command, "--run", "mine", "--cache-dir", str(tmp_path)]
    assert commands.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no run mine in ") and "there are: none" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [[], ["ponder"], ["plan", "--max-stepps=9"], ["generate"]])
def test_wrong_command_line_ends_with_code_2_and_how_to_use_it(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        commands.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: zeroflow")


def test_wrong_setting_is_refused_by_its_flag(console, capsys, tmp_path):
    assert commands.main(["plan", f"--cache-dir={tmp_path / 'cache'}", "--batch-size=0"]) == 1
    assert capsys.readouterr().err.startswith("error: --batch-size: ")
    assert not (tmp_path / "cache").exists()


def test_table_of_documents_keeps_a_line_for_each_whatever_their_ids():
    piece = Piece(row=0, part=0, offset=0, document="", url="", start=0, tokens=9, words="words")
    ids = ("a\nb", "\x1b[2J", "\udc80", "d3")
    _, *lines = commands._pieces_table([piece._replace(document=name) for name in ids])
    assert len(lines) == len(ids) and len({line.index("words") for line in lines}) == 1
    assert "a b" in lines[0] and "\\u001b[2J" in lines[1] and "\\udc80" in lines[2]
