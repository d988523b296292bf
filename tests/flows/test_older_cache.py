"""A cache that an older version wrote: everything in it is reused, resumed and read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from endings import assert_same_end
from patience import HANG_SECONDS
from pipeline import LOGINS, ROOT, SMALL_SHAPE, Flow

from zeroflow import artifacts

OLDER = "98b9331"
"""The last commit before the tree was rebuilt: records without a format version."""

TRAINED = [*SMALL_SHAPE, "--data-mode=sample"]
STOPPED = [*TRAINED, "--run-name=stopped", "--max-steps=600", "--checkpoint-every=100"]
STOPPED += ["--log-interval=10", "--validate-every=150"]


@pytest.fixture(scope="module")
def older_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of the older version."""
    tree = tmp_path_factory.mktemp("older")
    archive = subprocess.run(["git", "archive", OLDER], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip("the history of this checkout does not reach back that far")
    subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
    return tree


class OlderFlow(Flow):
    """The commands of the older version."""

    tree: Path

    def older(self, script: str, *flags: str) -> "subprocess.Popen[str]":
        login = LOGINS[self.environment["PREFECT_API_URL"]]  # which that version does not find
        return subprocess.Popen(
            [sys.executable, script, f"--cache-dir={self.cache}", *flags],
            cwd=self.tree,
            env=self.environment | {"PYTHONPATH": str(self.tree), "PREFECT_API_AUTH_STRING": login},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run_older(self, script: str, *flags: str, expect: int = 0) -> str:
        process = self.older(script, *flags)
        output, _ = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == expect, output
        return output


@pytest.mark.slow
def test_older_cache_is_reused_resumed_to_the_same_bits_and_read(
    older_tree: Path, tmp_path: Path, base_environment: dict[str, str], prefect_api: str
) -> None:
    flow = OlderFlow(tmp_path / "cache", base_environment | {"PREFECT_API_URL": prefect_api})
    flow.tree = older_tree
    flow.run_older("flows/pretrain.py", "--run-name=finished", *TRAINED)
    flow.run_older("flows/sweep.py", "--sweep-name=both", "--seeds", "0", "1", *TRAINED)
    process = flow.older("flows/pretrain.py", *STOPPED)
    flow.wait_for_step("stopped", 230, process)
    process.terminate()
    process.communicate(timeout=HANG_SECONDS)
    made = everything_built(flow.cache)

    undisturbed = OlderFlow(tmp_path / "undisturbed", flow.environment)
    undisturbed.tree = older_tree
    undisturbed.run_older("flows/pretrain.py", *STOPPED)

    output = flow.run(*STOPPED)
    assert "tokenizer reused" in output and "shards reused" in output
    assert "resumed at step" in output
    # The older version validated on the first held-out rows, this one on a sample of them
    but = ("val_loss",)
    assert_same_end(flow.folder("stopped"), undisturbed.folder("stopped"), but=but)

    output = flow.run("--run-name=finished", *TRAINED)
    assert "run finished is complete" in output and "training the model" not in output
    assert flow.report("finished")["stages"]["training"]["reused"]
    sweep = [sys.executable, "flows/sweep.py", f"--cache-dir={flow.cache}", "--sweep-name=both"]
    ended = subprocess.run(
        [*sweep, "--seeds", "0", "1", *TRAINED],
        cwd=ROOT,
        env=flow.environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 runs" in ended.stdout and "training the model" not in ended.stdout
    assert everything_built(flow.cache) == made, "nothing was built a second time"
    command = [sys.executable, "-m", "zeroflow.cli", "generate", "--run=finished", "--tokens=4"]
    text = subprocess.run(
        [*command, f"--cache-dir={flow.cache}", "--prompt=def f"],
        cwd=ROOT,
        env=os.environ | flow.environment,
        capture_output=True,
        text=True,
    )
    assert text.stdout.startswith("def f"), text.stderr
    compared = json.loads((flow.cache / "sweeps" / "both" / "comparison.json").read_text())
    assert len(compared["runs"]) == 2


def everything_built(cache: Path) -> dict[str, str]:
    """The sha256 of every file of tokenizers and shards."""
    files = [file for part in ("tokenizers", "shards") for file in (cache / part).rglob("*")]
    return {
        file.relative_to(cache).as_posix(): artifacts.file_sha256(file)
        for file in sorted(files)
        if file.is_file() and not file.name.startswith(".")
    }
