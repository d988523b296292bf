"""Measure the time from the command of a run to its first step, by phase, cold and warm.

The first run is cold: Prefect's database, compiled code, tokenizer and shards do not exist yet. The
others are warm: only the run is new. Flags of `zeroflow pretrain` follow after `--`.
"""

import argparse
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

log = logging.getLogger(__name__)


class Phase(NamedTuple):
    """A part of the start, which ends when the command prints a line."""

    name: str
    end: str
    """Regular expression that matches in the line."""


PHASES = (
    Phase("imports and flags", r"a Prefect server for this run"),
    Phase("rest of the server's start", r"Prefect UI: "),
    Phase("settings and plan", r"tokenizer(:| reused)"),
    Phase("tokenizer, shards", r"running the pre-flight"),
    Phase("pre-flight", r"pre-flight passed"),
    Phase("start of the training, first validation", r"step 0: validation loss"),
    Phase("first step", r"step 1/"),
    Phase("rest of the training", r"wall time of training"),
    Phase("MLflow, overfit check", r"overfit check passed"),
    Phase("report and end", r"^the process has ended$"),
)
"""In the order in which they end. The first seven are the start."""

FIRST_STEP = "first step"
FLAGS = ["--size=tiny", "--data-mode=sample", "--vocab-size=4096", "--max-steps=4"]


CPU = "CPU time of all processes until then"


class Line(NamedTuple):
    """A line that the command prints."""

    seconds: float
    """Time since the command began."""

    cpu_seconds: float
    """CPU time of all processes of the command so far."""

    text: str


def phases(lines: list[Line]) -> dict[str, float]:
    """Return the seconds of each phase. A line that does not appear adds its phase to the next."""
    found: dict[str, float] = {}
    begin = 0.0
    for phase in PHASES:
        end = next((line for line in lines if re.search(phase.end, line.text)), None)
        if end and end.seconds >= begin:
            found[phase.name] = end.seconds - begin
            begin = end.seconds
            if phase.name == FIRST_STEP:
                found[CPU] = end.cpu_seconds
    return found


def until_first_step(seconds: dict[str, float]) -> float:
    names = [phase.name for phase in PHASES]
    start = names[: names.index(FIRST_STEP) + 1]
    return sum(value for name, value in seconds.items() if name in start)


def printed_lines(command: list[str], environment: dict[str, str]) -> list[Line]:
    """Run `command` and return its lines; the last one is its end."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    tree = psutil.Process(process.pid)
    lines = [
        Line(time.monotonic() - began, cpu_seconds(tree), text.rstrip()) for text in process.stdout
    ]
    if code := process.wait():
        text = "\n".join(line.text for line in lines[-20:])
        raise SystemExit(f"the run ended with exit code {code}:\n{text}")
    return [*lines, Line(time.monotonic() - began, lines[-1].cpu_seconds, "the process has ended")]


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of `process`, its running descendants, and their ended children."""
    family = [process]
    with suppress(psutil.Error):
        family += process.children(recursive=True)
    total = 0.0
    for one in family:
        with suppress(psutil.Error):
            total += sum(one.cpu_times()[:4])
    return total


def measure(cache: Path, flags: list[str], runs: int) -> list[dict[str, float]]:
    """Return the seconds of each phase of `runs` runs, of which the first is cold."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PREFECT_HOME": str(cache / "prefect"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "zeroflow.cli", "pretrain", f"--cache-dir={cache}", *flags]
    measured = []
    for number in range(runs):
        busy = psutil.getloadavg()[0]
        lines = printed_lines([*command, f"--run-name=start-{number}"], environment)
        measured.append(phases(lines))
        kind = "warm" if number else "cold"
        first = until_first_step(measured[-1])
        log.info("%s: first step after %.1f s (load average before it: %.1f)", kind, first, busy)
    return measured


def table(measured: list[dict[str, float]]) -> str:
    """Return the seconds of each phase: the cold run, and the median of the warm runs."""
    cold, *warm = measured

    def row(name: str, of_cold: float, of_warm: list[float]) -> str:
        median = f"{statistics.median(of_warm):.1f}" if of_warm else "-"
        return f"| {name} | {of_cold:.1f} | {median} |"

    lines = ["| phase | cold, s | warm, s |", "| --- | ---: | ---: |"]
    for phase in PHASES:
        lines.append(row(phase.name, cold.get(phase.name, 0), [w.get(phase.name, 0) for w in warm]))
        if phase.name == FIRST_STEP:
            starts = [until_first_step(one) for one in warm]
            lines.append(row("**command to first step**", until_first_step(cold), starts))
            lines.append(row(CPU, cold.get(CPU, 0), [one.get(CPU, 0) for one in warm]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4, help="number of runs; the first is cold")
    parser.add_argument("--json", type=Path, help="file for the seconds of each run")
    parser.add_argument("flags", nargs="*", help=f"flags of the run. Default: {' '.join(FLAGS)}")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), arguments.flags or FLAGS, arguments.runs)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2))
    sys.stdout.write(f"{table(measured)}\n")


if __name__ == "__main__":
    main()
