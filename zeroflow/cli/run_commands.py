"""Commands about runs: their data, their plans, and the proof that they resume exactly."""

import json
import signal
from argparse import Namespace as Arguments
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zeroflow.cli.arguments import Parser, add_settings, any_number, read_settings, whole_number
from zeroflow.cli.command import Command, of_a_run
from zeroflow.cli.console import page_text, require_writable, show, terminate
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.text.markup import one_line, shortened, visible
from zeroflow.units import count

if TYPE_CHECKING:
    from zeroflow.data.provenance import Piece

_WIDTH = 60
"""Maximum number of characters of a text in a table."""


def _data(arguments: Arguments) -> None:
    from zeroflow.data import statistics
    from zeroflow.inference import trained
    from zeroflow.report import data_page

    job = trained.job(arguments.cache_dir, arguments.run)
    gathered = statistics.gather(job.shards, job.tokenizer)
    page = data_page.write_data(job.shards, gathered, job.tokenizer, job.folder)
    show(f"{page_text(page.linked)}\n")
    if job.folder.data_page.exists():
        show(f"{job.folder.data_page}")


def _documents_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--step", type=whole_number, required=True, help="as logged, from 1", metavar="N"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    of_a_run(parser)


def _documents(arguments: Arguments) -> None:
    from zeroflow.inference.trained import job
    from zeroflow.training.documents import documents_left_out, documents_of_step

    found = job(arguments.cache_dir, arguments.run)
    pieces = documents_of_step(found, arguments.step)
    gone = documents_left_out(found, arguments.step)
    if arguments.json:
        marked = [*((piece, True) for piece in gone), *((piece, False) for piece in pieces)]
        objects = (piece._asdict() | {"left_out": mark} for piece, mark in marked)
        lines = [visible(json.dumps(item, ensure_ascii=False)) for item in objects]
    else:
        lines = pieces_table(pieces)
        if gone:
            before = ["before a roll-back, which skipped them:", *pieces_table(gone)]
            lines = [*before, "since then:", *lines]
    show("\n".join(lines))


def pieces_table(pieces: Sequence["Piece"]) -> list[str]:
    shown = [
        piece._replace(
            document=one_line(piece.document),
            url=shortened(piece.url, _WIDTH),
            words=shortened(piece.words, _WIDTH),
        )
        for piece in pieces
    ]
    return _table(type(pieces[0])._fields, shown)


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a table with columns as wide as their content; numbers align right."""
    cells = [list(names), *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [">" if isinstance(value, int) else "<" for value in rows[0]]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True))
    return [form.format(*line).rstrip() for line in cells]


def _plan_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--gpu",
        help="plan for this GPU instead of this machine's device; a part of its name is enough",
        metavar="NAME",
    )
    parser.add_argument(
        "--memory-gb", type=any_number, help="memory of a GPU that is not known", metavar="GB"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(parser, RunConfig, "run")


def _plan(arguments: Arguments) -> None:
    from zeroflow import artifacts
    from zeroflow.report import plan_page
    from zeroflow.stages.plan import forecast

    asked = RunConfig.model_validate(read_settings(RunConfig, arguments))
    artifacts.require_possible_folder(asked.cache_dir, "--cache-dir")
    planned = forecast(asked, gpu=arguments.gpu, memory_gb=arguments.memory_gb)
    shown = planned.model_dump_json(indent=2) if arguments.json else plan_page.text(planned)
    show(shown)


def _shards_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--gpu", help="build for a run on this GPU instead of this machine's device", metavar="NAME"
    )
    add_settings(parser, RunConfig, "run")


def _shards(arguments: Arguments) -> None:
    from zeroflow.stages.prepare import build_together

    asked = RunConfig.model_validate(read_settings(RunConfig, arguments))
    require_writable(asked.cache_dir)
    signal.signal(signal.SIGTERM, terminate)  # releases the claims, so that others continue at once
    done = build_together(asked, gpu=arguments.gpu)
    show(f"{done.built} of {count(done.parts, 'part')} built here: {done.path}")


def _prove_arguments(parser: Parser) -> None:
    add_settings(parser, ProofRun, "proof")


def _prove(arguments: Arguments) -> None:
    from zeroflow import pipeline

    asked = ProofRun.model_validate(read_settings(ProofRun, arguments))
    require_writable(asked.run.cache_dir)
    page = pipeline.prove_resume(asked)
    show(f"{page_text(page.read_text(encoding='utf-8'))}\n\n{page}")


COMMANDS = (
    Command("data", "show the contents of a run's rows", of_a_run, _data),
    Command(
        "documents", "list the documents that a step trains on", _documents_arguments, _documents
    ),
    Command(
        "plan",
        "predict memory, time and disk space of a run",
        _plan_arguments,
        _plan,
        "Predict parameters, FLOPs, memory, time and disk space of the run that the same flags "
        "would start. The command may send requests to the Hub. It builds and records nothing.",
    ),
    Command(
        "shards",
        "build the shards of a run, together with other processes",
        _shards_arguments,
        _shards,
        "Build only the shards of a run. Any number of these commands with the same settings "
        "divide the parts among them, on all machines that share the cache folder. If one dies, "
        "another takes over its parts after a minute.",
    ),
    Command(
        "prove-resume",
        "prove that training that was killed resumes bit for bit",
        _prove_arguments,
        _prove,
        "Train twice, once undisturbed and once with repeated kills, and compare every bit. "
        "The defaults are small: a minute or two on a CPU.",
    ),
)
