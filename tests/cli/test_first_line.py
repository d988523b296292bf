"""The first line, printed before libraries that take seconds to import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANG_SECONDS
from pipeline import ROOT, free_port, processes_with

from zeroflow.cli import commands, program

IMPORTED = "raise SystemExit('torch is imported')"


NO_SERVER = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}


def said(
    tmp_path: Path, environment: dict[str, str], *command: str, torch: str = IMPORTED
) -> tuple[str, str]:
    """What a command prints to its two outputs before it imports PyTorch, at which it ends."""
    (tmp_path / "torch.py").write_text(torch)
    path = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    return ended.stdout, ended.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["flows/pretrain.py", "--size", "tiny"],
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in (
                ["flows/sweep.py"],
                ["flows/prove_resume.py"],
                ["flows/zero_lab.py"],
                ["-m", "zeroflow.cli", "pretrain"],
            )
        ),
        ["-m", "zeroflow.cli", "ui"],
    ],
)
def test_command_prints_a_line_before_it_imports_anything_large(
    tmp_path, base_environment, command
):
    output, errors = said(tmp_path, base_environment | NO_SERVER, *command)
    assert errors.endswith("torch is imported\n")
    assert output[8:] == "  starting: importing PyTorch and Prefect\n"


@pytest.mark.parametrize("command", [["flows/pretrain.py"], ["-m", "zeroflow.cli", "plan"]])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, base_environment, command):
    environment = base_environment | NO_SERVER
    _, errors = said(tmp_path, environment, *command, torch="raise KeyboardInterrupt")
    assert errors == "stopped\n"


def test_server_that_is_started_meanwhile_ends_with_a_command_that_fails(
    tmp_path, base_environment
):
    home = tmp_path / "home"
    said(tmp_path, base_environment | {"PREFECT_HOME": str(home)}, "flows/pretrain.py")
    assert home.stat().st_mode & 0o077 == 0
    assert list(home.glob("zeroflow/*")) == [], "no login of a server is left"
    assert processes_with("PREFECT_HOME", home) == []


@pytest.mark.parametrize(
    "command",
    [
        ["flows/pretrain.py", "--help"],
        ["-m", "zeroflow.cli", "sweep", "-h"],
        ["-m", "zeroflow.cli", "plan", "--json"],
    ],
)
def test_help_and_output_for_pipes_have_no_first_line(tmp_path, base_environment, command):
    output, errors = said(tmp_path, base_environment, *command)
    assert errors.endswith("torch is imported\n") and output == ""


def test_command_whose_output_is_for_programs_announces_itself_in_a_terminal(
    tmp_path, base_environment
):
    (tmp_path / "torch.py").write_text(IMPORTED)
    path = f"{tmp_path}:{base_environment.get('PYTHONPATH', '')}"
    ours, theirs = os.openpty()
    ended = subprocess.run(
        [sys.executable, "-m", "zeroflow.cli", "plan", "--json"],
        cwd=ROOT,
        env=base_environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=HANG_SECONDS,
    )
    os.close(theirs)
    assert ended.stdout == b""
    assert os.read(ours, 1000).decode()[8:].startswith("  starting: importing PyTorch\r\n")
    os.close(ours)


def test_misspelt_command_is_corrected_before_anything_large_is_imported(
    tmp_path, base_environment
):
    output, errors = said(tmp_path, base_environment, "-m", "zeroflow.cli", "pretrian")
    assert output == ""
    assert errors == "error: there is no command pretrian: did you mean pretrain?\n"


def test_every_command_is_known_before_the_imports():
    assert {*program.LONG, *program.SHORT} == {
        *commands._FLOWS,
        *(command.name for command in commands._COMMANDS),
    }
