"""The `zeroflow` command."""

import io
import json
import re
import sys

import pytest

from zeroflow.cli import commands, model_commands, run_commands
from zeroflow.data.provenance import Piece


@pytest.mark.parametrize(
    "command", [["generate"], ["export", "--out", "out"], ["export", "--register", "mine"]]
)
def test_command_for_a_missing_run_says_so(console, capsys, tmp_path, command):
    argv = [*command, "--run", "mine", "--cache-dir", str(tmp_path)]
    assert commands.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no run mine in ") and "existing runs: none" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["ponder"], "choose from 'pretrain', 'sweep', "),
        (["export"], "arguments are required: --run"),
        (["generate", "--samples=0"], "--samples: must be at least 1 (found '0')"),
        (["generate", "--step=last"], "--step: must be a whole number (found 'last')"),
        (["plan", "--memory-gb=much"], "--memory-gb: must be a number (found 'much')"),
        (["generate", "--prompt=a", "--interactive"], "not allowed with argument --prompt"),
        (["plan", "--max-stepps=9"], "there is no --max-stepps: did you mean --max-steps?"),
        (["pretrain", "--max_steps", "9"], "no --max_steps: did you mean --max-steps?"),
        (["pretrain", "--lr=1"], "there is no --lr: did you mean --learning-rate?"),
        (["pretrain", "--banana"], "there is no --banana\n"),
        (["pretrain", "9"], "'9' belongs to no flag"),
        (["sweep", "--size", "tiny", "small"], "too many for --size: did you mean --sizes?"),
        (["sweep", "--run-name=a"], "there is no --run-name"),
    ],
)
def test_wrong_command_line_ends_with_code_2_and_a_suggestion_in_two_lines(capsys, argv, message):
    with pytest.raises(SystemExit) as ended:
        commands.main(argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said
    assert said.splitlines()[1].startswith("`zeroflow ") and said.count("\n") == 2


def test_json_is_alone_on_standard_output(console, capsys, tmp_path):
    for name in ("a", "copy"):
        (tmp_path / f"{name}.txt").write_text("some text of a document. " * 200)
    argv = ["plan", "--json", f"--cache-dir={tmp_path / 'cache'}", "--data-mode=files"]
    (tmp_path / "b.txt").write_text("another text. " * 200)
    argv += ["--data-path", str(tmp_path / "*.txt")]
    argv += ["--validation-path", str(tmp_path / "a.txt"), "--tokenizer-name=train"]
    assert commands.main([*argv, "--vocab-size=300", "--device=cpu"]) == 0
    said = capsys.readouterr()
    assert "2 files left out of training" in said.err
    assert json.loads(said.out)["data"]["name"] == "files"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name a new folder with --out"),
        (["--register=a", "--push=me/a"], "name a new folder with --out"),
        (["--register=a", "--format=gguf"], "--register needs --format hf, not gguf"),
        (["--register=a/b"], "--register: a name may contain only letters, digits"),
    ],
)
def test_export_that_has_no_effect_or_no_folder_is_refused(
    console, capsys, tmp_path, flags, message
):
    assert commands.main(["export", "--run=mine", f"--cache-dir={tmp_path}", *flags]) == 1
    assert message in capsys.readouterr().err


COMMANDS = ["pretrain", "sweep", "zero-lab", "plan", "prove-resume", "ui", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_a_usage_of_one_line(capsys, command):
    with pytest.raises(SystemExit) as ended:
        commands.main([command, "--help"])
    assert ended.value.code == 0
    usage, empty, *_ = capsys.readouterr().out.split("\n")
    assert usage.startswith(f"usage: zeroflow {command} ") and not empty


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        ("sweep", {"--sweep", "--run-name"}),
        ("zero-lab", {"--sweep", "--zero-stage", "--skip-preflight", "--evaluate-tasks"}),
        ("prove-resume", {"--sweep", "--skip-preflight", "--overfit-loss", "--evaluate-path"}),
    ],
)
def test_command_offers_no_setting_that_it_would_refuse(capsys, command, left_out):
    with pytest.raises(SystemExit):
        commands.main([command, "--help"])
    offered = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert "--max-steps" in offered and not offered & left_out


def test_wrong_setting_is_refused_by_its_flag(console, capsys, tmp_path):
    assert commands.main(["plan", f"--cache-dir={tmp_path / 'cache'}", "--batch-size=0"]) == 1
    assert capsys.readouterr().err.startswith("error: --batch-size: ")
    assert not (tmp_path / "cache").exists()


PATHS = ("../runs/mine", "/tmp/mine", "runs/mine", "..", "")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--run"],
        ["export", "--out=out", "--run"],
        ["evaluate", "--run"],
        ["data", "--run"],
        ["documents", "--step=1", "--run"],
        ["plan", "--run-name"],
    ],
)
def test_path_instead_of_the_name_of_a_run_is_refused(console, capsys, tmp_path, command, name):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").touch()
    assert commands.main([*command, name, "--cache-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "a name may contain only letters, digits, dots," in said and repr(name) in said


def test_plan_for_a_cache_below_a_file_is_refused_as_the_run_would_be(console, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert commands.main(["plan", f"--cache-dir={tmp_path}/file/x", "--data-mode=synthetic"]) == 1
    assert f"--cache-dir {tmp_path}/file/x: {tmp_path}/file is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a model: --run NAME, or --from DIR"),
        (["--from=.", "--best"], "--from names a folder, and --run, --step and --best have no"),
        (["--from=nowhere"], "nowhere is not a model that transformers opens: it has no config"),
        (["--run=mine", "--top-p=0"], "--top-p: "),
    ],
)
def test_generate_without_one_model_is_refused(console, capsys, argv, message):
    assert commands.main(["generate", *argv]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_prompt_on_standard_input_that_is_not_utf8_is_refused_after_those_before_it(monkeypatch):
    content = io.BytesIO("one\ncafé\n".encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, "utf-8", line_buffering=True))
    with pytest.raises(ValueError, match="a prompt is not UTF-8: encode the input as UTF-8"):
        list(model_commands._prompts())


def test_table_of_documents_has_one_line_for_each_document_with_any_id():
    piece = Piece(row=0, part=0, offset=0, document="", url="", start=0, tokens=9, words="words")
    ids = ("a\nb", "\x1b[2J", "\udc80", "d3")
    _, *lines = run_commands.pieces_table([piece._replace(document=name) for name in ids])
    assert len(lines) == len(ids) and len({line.index("words") for line in lines}) == 1
    assert "a b" in lines[0] and "\\u001b[2J" in lines[1] and "\\udc80" in lines[2]
