"""The command line, made from the settings classes, and the `zeroflow` command."""

import argparse
import json
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
)

from zeroflow import pipeline
from zeroflow.orchestration.ui import UiConfig
from zeroflow.report.progress import console
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import DEFAULT_CACHE, RunConfig
from zeroflow.training.sampling import SamplingConfig

if TYPE_CHECKING:
    from zeroflow.data.provenance import Piece
from zeroflow.cli.console import Terminated, fail, log_to_console, require_writable, terminate
from zeroflow.cli.flags import add_settings, read_settings


def main(
    argv: Sequence[str] | None = None, *, prove: Callable[[ProofRun], Path] = pipeline.prove
) -> int:
    """The `zeroflow` command.

    Args:
        prove: what `prove-resume` calls.
    """
    parser = argparse.ArgumentParser(prog="zeroflow", description="Use what a run has made.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="print text that a run's model makes")
    generate.add_argument("--prompt", default="", help="text to go on from")
    add_settings(generate, SamplingConfig, "sampling")
    export = commands.add_parser("export", help="write a folder that plain transformers opens")
    export.add_argument("--out", type=Path, required=True, help="new folder")
    data = commands.add_parser("data", help="show what a run's rows are made of")
    documents = commands.add_parser("documents", help="list the documents that a step trains on")
    documents.add_argument("--step", type=int, required=True, help="as logged, from 1", metavar="N")
    documents.add_argument("--json", action="store_true", help="an object a line, for programs")
    for command in (generate, export, data, documents):
        command.add_argument("--run", required=True, help="name of the run")
        command.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE)
    planning = commands.add_parser(
        "plan",
        allow_abbrev=False,  # a misspelt flag is an error
        help="say what a run will be and need, and start nothing",
        description="Parameters, FLOPs, memory, time and disk of a run, before it is one. Nothing "
        "is looked up, built or recorded.",
    )
    planning.add_argument(
        "--gpu", help="for this one, instead of this machine's device", metavar="NAME"
    )
    planning.add_argument("--json", action="store_true", help="an object, for programs")
    add_settings(planning, RunConfig, "run")
    proving = commands.add_parser(
        "prove-resume",
        allow_abbrev=False,  # a misspelt flag is an error
        help="train undisturbed and killed, and compare every bit",
        description="Train twice, once killed again and again, and compare every bit. What is not "
        "given is small: a minute or two on a CPU.",
    )
    add_settings(proving, ProofRun, "proof")
    setup = commands.add_parser(
        "prefect-setup", help="give a Prefect server its work pool, and notice of killed runs"
    )
    ui = commands.add_parser(
        "ui",
        help="start Prefect's and MLflow's user interfaces, and a worker",
        description="Start Prefect's server with a form for each size, a worker that runs what is "
        "asked for there, and MLflow. Ctrl-C stops all of it.",
    )
    add_settings(ui, UiConfig, "ui")
    for command in (generate, export, data, documents, planning, proving, setup, ui):
        command.add_argument("--verbose", action="store_true", help="tracebacks")
    arguments = parser.parse_args(argv)
    log_to_console(verbose=arguments.verbose)
    try:
        if arguments.command == "prove-resume":
            asked = ProofRun.model_validate(read_settings(ProofRun, arguments))
            require_writable(asked.run.cache_dir)
            page = prove(asked)
            console.print(page.read_text(encoding="utf-8"), f"{page}", sep="\n", markup=False)
        else:
            _COMMANDS[arguments.command](arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return fail(error, verbose=arguments.verbose)


def _generate(arguments: argparse.Namespace) -> None:
    from zeroflow.training import sampling

    config = SamplingConfig.model_validate(read_settings(SamplingConfig, arguments))
    trained = _load(arguments)
    if trained.tokenizer.path is None:
        if arguments.prompt:
            raise ValueError(f"run {arguments.run} was trained on token ids: it takes no --prompt")
        ids = sampling.complete_ids(
            trained.model, trained.tokenizer, config, context=trained.context
        )
        text = " ".join(map(str, ids))
    else:
        text = sampling.complete(
            trained.model, trained.tokenizer, arguments.prompt, config, context=trained.context
        )
    console.print(text, markup=False)


def _export(arguments: argparse.Namespace) -> None:
    from zeroflow.inference.export import export

    trained = _load(arguments)
    export(trained.model, trained.tokenizer, arguments.out, context=trained.context)
    console.print(f"{arguments.out}", markup=False)


def _data(arguments: argparse.Namespace) -> None:
    from zeroflow.inference import trained
    from zeroflow.report import data_page

    job = trained.job(arguments.cache_dir, arguments.run)
    page = data_page.write_data(job.shards, job.tokenizer, job.folder)
    console.print(page.read_text(encoding="utf-8"), markup=False)
    console.print(f"{page}", markup=False)


def _plan(arguments: argparse.Namespace) -> None:
    from zeroflow.report import plan as plans
    from zeroflow.report import plan_page

    asked = RunConfig.model_validate(read_settings(RunConfig, arguments))
    planned = plans.offline(asked, gpu=arguments.gpu)
    shown = planned.model_dump_json(indent=2) if arguments.json else plan_page.text(planned)
    console.print(shown, markup=False)


def _prefect_setup(arguments: argparse.Namespace) -> None:
    from zeroflow.orchestration.deployments import set_up

    set_up()


def _ui(arguments: argparse.Namespace) -> None:
    from zeroflow.orchestration import ui

    config = UiConfig.model_validate(read_settings(UiConfig, arguments))
    require_writable(config.cache_dir)
    signal.signal(signal.SIGTERM, terminate)
    with suppress(KeyboardInterrupt, Terminated):  # the way to stop it
        ui.serve(config)


def _documents(arguments: argparse.Namespace) -> None:
    from zeroflow.report.documents import documents, left_out

    asked = (arguments.cache_dir, arguments.run, arguments.step)
    pieces, gone = documents(*asked), left_out(*asked)
    if arguments.json:
        marked = [*((piece, True) for piece in gone), *((piece, False) for piece in pieces)]
        objects = (piece._asdict() | {"left_out": mark} for piece, mark in marked)
        lines = [json.dumps(item, ensure_ascii=False) for item in objects]
    else:
        lines = _pieces_table(pieces)
        if gone:
            before = ["before a roll-back, which left them out:", *_pieces_table(gone)]
            lines = [*before, "since then:", *lines]
    console.print("\n".join(lines), markup=False)


def _pieces_table(pieces: Sequence["Piece"]) -> list[str]:
    shown = [
        piece._replace(url=_shortened(piece.url), words=_shortened(piece.words)) for piece in pieces
    ]
    return _table(type(pieces[0])._fields, shown)


_COMMANDS = {
    "generate": _generate,
    "export": _export,
    "data": _data,
    "documents": _documents,
    "plan": _plan,
    "prefect-setup": _prefect_setup,
    "ui": _ui,
}


_WIDTH = 60
"""Of a text in a table, at most."""


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table as wide as its contents; numbers to the right."""
    cells = [list(names), *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [">" if isinstance(value, int) else "<" for value in rows[0]]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True))
    return [form.format(*line).rstrip() for line in cells]


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _load(arguments: argparse.Namespace) -> Any:
    from zeroflow.inference import trained

    return trained.load(arguments.cache_dir, arguments.run)


def entry() -> None:
    raise SystemExit(main())


if __name__ == "__main__":
    entry()
