"""Thirty SIGKILLs over one whole run, in every stage, and no difference at the end."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from endings import assert_same_end, wait_until_gone
from pipeline import SMALL_SHAPE, Flow, processes_of
from tiny import contents

STEPS = 2000
RUN = [*SMALL_SHAPE, "--run-name=run", "--data-mode=files", "--tokenizer-name=train"]
RUN += [f"--max-steps={STEPS}", "--log-interval=10", "--checkpoint-every=50"]
RUN += ["--validate-every=75", "--vocab-size=2000"]


@pytest.mark.slow
def test_thirty_kills_anywhere_change_no_bit(
    flow: Flow, tmp_path: Path, base_environment: dict[str, str]
) -> None:
    rng = random.Random(0)
    text = write_text(tmp_path / "text.jsonl", rng)
    run = [*RUN, f"--data-path={text}"]
    calm = Flow(tmp_path / "calm", flow.environment)
    calm.run(*run)

    runs = flow.folder("run")
    # What has to be seen first, the seconds until the kill at most, and how often
    stages: list[tuple[str, Callable[[], bool], float, int]] = [
        ("start-up", lambda: True, 8.0, 4),
        ("tokenizer", (flow.cache / "tokenizers").exists, 1.0, 4),
        ("shards", (flow.cache / "shards").exists, 1.0, 6),
        ("training", lambda: trains(flow), 8.0, 7),
        ("saving", lambda: any((runs / "checkpoints").glob(".*")), 0.02, 6),
        ("overfit check", (runs / "overfit-job.json").exists, 4.0, 3),
    ]
    killed: Counter[str] = Counter()
    for stage, begun, longest, times in stages:
        for _ in range(times):
            process = flow.start(*run)
            if wait_for(begun, process):
                time.sleep(rng.uniform(0.0, longest))
            if process.poll() is None:
                killed[f"{stage}, {kill(flow, process, rng)}"] += 1
            process.communicate()
            wait_until_gone(flow.cache)
    assert sum(killed.values()) >= 28, f"two may have come too late: {killed}"

    flow.run(*run)
    assert_same_end(flow.folder("run"), calm.folder("run"))
    assert flow.report("run")["overfit"] == calm.report("run")["overfit"]
    for part in ("tokenizers", "shards"):
        ours, theirs = (made(f.cache / part) for f in (flow, calm))
        assert ours == theirs, part


def write_text(path: Path, rng: random.Random) -> Path:
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]
    documents = (" ".join(rng.choices(words, k=rng.randint(20, 400))) for _ in range(3000))
    path.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
    return path


def trains(flow: Flow) -> bool:
    return any(
        "zeroflow.training.serving" in process.cmdline() for process in processes_of(flow.cache)
    )


def wait_for(begun: Callable[[], bool], process: "subprocess.Popen[str]") -> bool:
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            if begun():
                return True
        time.sleep(0.005)
    return False


def kill(flow: Flow, process: "subprocess.Popen[str]", rng: random.Random) -> str:
    """SIGKILL to the flow, or to all that belongs to it at once."""
    if rng.random() < 0.5:
        process.kill()
        return "the flow"
    for one in [*processes_of(flow.cache), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return "all processes"


def made(folder: Path) -> dict[str, bytes]:
    """What a stage has made, without the locks beside it."""
    return {
        name: data
        for name, data in contents(folder).items()
        if not name.endswith((".lock", "builds.jsonl"))
    }
