"""What a run has left, for those who use it: its model, its figures, and where all of it lies."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from zeroflow import artifacts, settling, tracking
from zeroflow.data import lookup
from zeroflow.data.batches import Batches, Skip
from zeroflow.data.lookup import Piece
from zeroflow.data.shards import Rows
from zeroflow.data.tokenizer import TokenizerFiles
from zeroflow.model.llama import Llama
from zeroflow.planning import speed
from zeroflow.run import DEFAULT_CACHE
from zeroflow.training import checkpoint, events, goodput
from zeroflow.training.job import CHECKPOINTS, JOB, TrainingJob


class Trained(NamedTuple):
    model: Llama
    """On the CPU, of the newest checkpoint."""

    tokenizer: TokenizerFiles
    context: int
    """Tokens it was trained on at once."""


def load(cache: Path, name: str) -> Trained:
    """The model of run `name` with its tokenizer.

    Raises:
        ValueError: there is no such run, or it has no checkpoint yet.
    """
    settings = settling.load(cache, name)
    newest = checkpoint.latest(settings.run_dir / CHECKPOINTS)
    if newest is None:
        raise ValueError(f"run {name} has no checkpoint yet in {settings.run_dir}")
    context = settings.shard_config.seq_len
    return Trained(checkpoint.load_model(newest), job(cache, name).tokenizer, context)


def job(cache: Path, name: str) -> TrainingJob:
    """What the training of run `name` was given.

    Raises:
        ValueError: there is no such run, or it has not come as far as that.
    """
    settings = settling.load(cache, name)
    file = settings.run_dir / JOB
    if not file.exists():
        raise ValueError(f"run {name} has no data yet in {settings.run_dir}")
    found = TrainingJob.model_validate(artifacts.read_json(file))
    # The cache may have been moved since
    tokens = found.tokenizer
    if tokens.path is not None:
        tokens = tokens.replace(path=cache / "tokenizers" / tokens.path.name)
    rows = found.shards.replace(path=cache / "shards" / found.shards.path.name)
    return found.replace(run_dir=settings.run_dir, tokenizer=tokens, shards=rows)


def documents(cache: Path, name: str, step: int) -> list[Piece]:
    """The documents that optimiser step `step` (from 1, as logged) of run `name` trains on.

    Raises:
        ValueError: there is no such run, or it has no such step.
    """
    found = job(cache, name)
    return _pieces(found, step, found.skips)


def left_out(cache: Path, name: str, step: int) -> list[Piece]:
    """The documents that `step` had before a roll-back left them out; of most steps none.

    Raises:
        ValueError: as for `documents`.
    """
    found = job(cache, name)
    gone = []
    for number, skip in enumerate(found.skips):
        if skip.step < step <= skip.step + skip.batches:
            gone += _pieces(found, step, found.skips[:number])
    return gone


def _pieces(found: TrainingJob, step: int, skips: tuple[Skip, ...]) -> list[Piece]:
    config = found.training
    if not 1 <= step <= config.steps:
        raise ValueError(
            f"run {found.run_dir.name} has no step {step}: its steps are 1 to {config.steps}"
        )
    shards = found.shards.replace(parts=_parts_read(found, step))
    batches = Batches(
        Rows(shards, "train"),
        end_of_text=shards.end_of_text,
        seed=config.seed,
        micro_batch_rows=config.micro_batch_rows,
        accumulate=config.accumulate,
        ranks=config.ranks,
        skips=skips,
    )
    return lookup.pieces(shards, found.tokenizer, batches.row_ids(step - 1).flatten())


def _parts_read(job: TrainingJob, step: int) -> int:
    """Parts of the shards that the process read which did `step`: a run that is extended has more.

    The last one to begin before the step, as what others did of it was not kept.
    """
    history = events.read(job.run_dir / events.EVENTS)
    read = [e["parts"] for e in history if e["event"] == "started" and e["step"] < step]
    return read[-1] if read else job.shards.parts


def summary(report_file: Path, cache: Path) -> str:
    """The end of a run in a few lines: figures, and where everything is."""
    report = artifacts.read_json(report_file)
    folder = report_file.parent
    bpb = f", {report['val_bpb']:.3f} bits per byte" if report["val_bpb"] else ""
    floor = f" (entropy of the data {report['entropy']:.4f})" if report["entropy"] else ""
    mfu = f", MFU {report['mfu']:.1%}" if report["mfu"] is not None else ""
    overfit, time = report["overfit"], report["time"]
    expected = report["expected_loss"]
    band = [f"  expected loss    {expected['verdict']}"] if expected["runs"] else []
    of_run = f"--run {report['run']}{_flag(cache)}"
    lines = [
        "",
        f"run {report['run']} is complete",
        f"  validation loss  {report['first_val_loss']:.4f} -> {report['val_loss']:.4f}"
        f"{floor}{bpb}",
        *band,
        f"  trained          {report['steps']:,} steps, {report['tokens']:,} tokens, "
        f"{speed(report['tokens_per_second'])}{mfu}",
        f"  time             {goodput.summary(time['shares'], time['wall_seconds'])}",
        f"  overfit check    passed: loss {overfit['loss']:.4f} after {overfit['steps']} steps",
        f"  report           {folder / 'report.md'}",
        f"  checkpoint       {report['checkpoint']}",
        f"  text             {_program('zeroflow')} generate {of_run} --prompt '...'",
        f"  transformers     {_program('zeroflow')} export {of_run} --out DIR",
        f"  both UIs         {_program('zeroflow')} ui{_flag(cache)}",
        *(f"  {what:16} {page}" for what, page in tracking.links(folder, cache).items()),
    ]
    return "\n".join(lines)


def _flag(cache: Path) -> str:
    return "" if cache == DEFAULT_CACHE else f" --cache-dir {shlex.quote(str(cache))}"


def _program(name: str) -> str:
    """How to call a program of this environment in a shell."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) or not path.exists():
        return name
    return shlex.quote(str(path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path))
