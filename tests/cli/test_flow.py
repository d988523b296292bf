"""Commands of flows that are refused at once, before Prefect is imported or its server started, or
that are stopped.
"""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from patience import HANG_SECONDS
from public_tokenizers import of_bytes, save

from zeroflow.cli import commands
from zeroflow.cli.console import Terminated
from zeroflow.orchestration import flow_context, flow_runs, server
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import settle

FILES = "--data-mode=files"
SAMPLE = "--data-mode=sample"
IDS = "--data-mode=synthetic"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with texts and tokenizers, good and bad ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("words of a text\n")
    (tmp_path / "array.json").write_text('[{"text": "one"}]')
    (tmp_path / "other.jsonl").write_text('{"words": "one"}\n')
    for name in ("empty.txt.gz", "empty.txt", "empty.jsonl"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "image.png").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "endless").mkdir()
    save(tmp_path / "endless", of_bytes(), {})
    return tmp_path


SYNTHETIC = {"data_mode": "synthetic"}

REFUSED = [
    ("pretrain", [FILES, "--data-path=none.txt"], "none.txt matches no file in "),
    ("pretrain", [FILES, "--data-path=image.png"], "image.png: unknown kind of file"),
    ("pretrain", [FILES, "--data-path=array.json"], "array.json begins with a JSON array"),
    ("pretrain", [FILES, "--data-path=other.jsonl"], "line 1 has no text in field 'text'"),
    ("pretrain", [FILES, "--data-path=empty.txt.gz"], "empty.txt.gz cannot be read: it is empty"),
    ("pretrain", [FILES, "--data-path=empty.txt"], "empty.txt is empty: name files that contain"),
    ("pretrain", [FILES, "--data-path=empty.jsonl"], "empty.jsonl is empty: name files"),
    (
        "pretrain",
        [FILES, "--data-path", "empty.txt", "empty.jsonl"],
        "empty.jsonl and all other files of --data-path are empty",
    ),
    (
        "pretrain",
        [FILES, "--data-path=good.txt", "--validation-path=empty.txt"],
        "empty.txt is empty",
    ),
    ("pretrain", [FILES, "--data-path=pipe.txt"], "pipe.txt is not a regular file"),
    ("pretrain", [FILES, "--data-path=circle.txt"], "circle.txt is a link that leads to itself"),
    ("pretrain", [FILES, "--data-path=good.txt", "--validation-path=no*.txt"], "matches no file"),
    ("pretrain", [SAMPLE, "--tokenizer-name=./none"], "--tokenizer-name ./none: no such file"),
    ("pretrain", [SAMPLE, "--tokenizer-name=broken"], "tokenizer.json is not a valid tokenizer"),
    ("pretrain", [SAMPLE, "--tokenizer-name=endless", "--end-of-text=<x>"], "has no token <x>"),
    (
        "pretrain",
        [SAMPLE, "--token-type=uint16", "--vocab-size=100000"],
        "--vocab-size 100000 gives ids up to 99,999, and --token-type uint16 holds",
    ),
    ("pretrain", [SAMPLE, "--batch-tokens=500"], "is not a multiple of --seq-len 256: use 256"),
    ("pretrain", [SAMPLE, "--warmup-steps=500"], "--warmup-steps 500 leaves none of 200 steps"),
    ("pretrain", [SAMPLE, "--device=cuda"], "--device cuda, but PyTorch sees no GPU"),
    ("pretrain", [SAMPLE, "--text-column=words"], "--text-column has no effect"),
    ("pretrain", [IDS, "--run-name=mine", "--seed=2"], "--seed 1, now it is 2: use another --run"),
    ("sweep", [IDS, "--sweep-name=s", "--seeds=1", "--max-steps=9"], "use another --sweep-name"),
    ("pretrain", [SAMPLE, "--cache-dir=good.txt"], "name another --cache-dir"),
    ("sweep", [FILES, "--data-path=none.txt", "--seeds", "0", "1"], "matches no file"),
    ("sweep", [SAMPLE, "--batch-tokens=500", "--sizes", "tiny", "small"], "--seq-len 256"),
]


@pytest.mark.parametrize(("command", "flags", "message"), REFUSED)
def test_wrong_settings_and_files_are_refused_before_prefect_starts(
    folder: Path, console: None, capsys: pytest.CaptureFixture[str], command, flags, message
) -> None:
    for name in ("mine", "s-tiny-seed1"):
        started = RunConfig(run_name=name, cache_dir="cache", seed=1, data=SYNTHETIC)
        (settle(started).run.folder.checkpoints / "step-00000001").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        commands.main([command, "--cache-dir=cache", *flags])
    said = capsys.readouterr()
    # Another --cache-dir may help, but the command line of the others has to be corrected
    assert ended.value.code == (1 if "good.txt" in flags[-1] and "cache" in flags[-1] else 2)
    assert message in said.err
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert said.out == "", "nothing was started"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(143), 143)])
def test_stopped_command_says_how_to_resume_and_has_the_exit_code_of_its_signal(
    tmp_path, monkeypatch, console, capsys, stop, code
):
    def stopped(*_: object, **__: object) -> None:
        raise stop

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(server, "server", lambda: nullcontext("http://127.0.0.1:4200"))
    monkeypatch.setattr(flow_runs, "run_here", stopped)
    monkeypatch.setattr(flow_context, "leave", sys.exit)  # without it, the tests end, too
    with pytest.raises(SystemExit) as ended:
        commands.main(["pretrain", f"--cache-dir={tmp_path}", IDS, "--seq-len=32", "--verbose"])
    signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (code, "")
    assert "stopped; finished work is kept, and the same command resumes from there" in said.out


def test_ctrl_c_while_prefect_is_imported_ends_like_a_program_that_the_signal_ended(
    tmp_path, base_environment
):
    arrives = "import signal\nsignal.raise_signal(signal.SIGINT)\n"
    (tmp_path / "prefect.py").write_text(arrives)
    program = "from zeroflow.cli import flow\nflow._import_flows(verbose=False)"
    path = f"{tmp_path}:{base_environment.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=base_environment | {"PYTHONPATH": path, "PREFECT_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == -signal.SIGINT, done.stderr
