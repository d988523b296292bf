"""The last lines that a run's command prints: figures, and paths of the results."""

import shlex
import shutil
import sys
from pathlib import Path

from zeroflow.report.records import RunReport
from zeroflow.run_folder import DEFAULT_CACHE, RunFolder
from zeroflow.tracking.viewer import links
from zeroflow.training import goodput
from zeroflow.units import count, speed


def summary(report_file: Path, cache: Path) -> str:
    """Return a summary of a run in a few lines: figures, and paths of the results."""
    report = RunReport.read(report_file)
    folder = RunFolder(report_file.parent)
    bpb = f", {report.val_bpb:.3f} bits per byte" if report.val_bpb else ""
    if report.validated:
        bpb += report.validated.without_unknown
    floor = f" (entropy of the data {report.entropy:.4f})" if report.entropy else ""
    mfu = f", MFU {report.mfu:.1%}" if report.mfu is not None else ""
    overfit, time, expected = report.overfit, report.time, report.expected_loss
    band = [f"  expected loss    {expected.verdict}"] if expected.runs else []
    of_run = f"--run {report.run}{_flag(cache)}"
    text = [f"  text             {_program('zeroflow')} generate {of_run} --prompt '...'"]
    lines = [
        "",
        f"run {report.run} is complete",
        f"  validation loss  {report.first_val_loss:.4f} -> {report.val_loss:.4f}{floor}{bpb}",
        *band,
        f"  trained          {count(report.steps, 'step')}, {report.tokens:,} tokens, "
        f"{speed(report.tokens_per_second)}{mfu}",
        f"  time             {goodput.summary(time.shares, time.wall_seconds)}",
        f"  overfit check    passed: loss {overfit.loss:.4f} after {count(overfit.steps, 'step')}",
        f"  report           {folder.report_page}",
        f"  checkpoint       {report.checkpoint}",
        *(text if report.data.mode != "synthetic" else []),
        f"  transformers     {_program('zeroflow')} export {of_run} --out DIR",
        f"  both UIs         {_program('zeroflow')} ui{_flag(cache)}",
        *(f"  {what:16} {page}" for what, page in links(folder).items()),
    ]
    return "\n".join(lines)


def in_one_line(report_file: Path) -> str:
    """Return the result of a run on one line, for a message."""
    report = RunReport.read(report_file)
    bpb = f", {report.val_bpb:.3f} bits per byte" if report.val_bpb else ""
    expected = report.expected_loss
    band = f"; expected loss: {expected.verdict}" if expected.runs else ""
    return (
        f"validation loss {report.first_val_loss:.4f} -> {report.val_loss:.4f}{bpb} after "
        f"{count(report.steps, 'step')}{band}"
    )


def _flag(cache: Path) -> str:
    return "" if cache == DEFAULT_CACHE else f" --cache-dir {shlex.quote(str(cache))}"


def _program(name: str) -> str:
    """Return the shell command for a program of this environment."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) or not path.exists():
        return name
    return shlex.quote(str(path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path))
