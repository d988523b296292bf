"""The command line, made from the settings classes, and the `zeroflow` command."""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    TextIO,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.logging import RichHandler

from zeroflow import proof, settling
from zeroflow.generate import SamplingConfig
from zeroflow.progress import console
from zeroflow.proof import ProofRun
from zeroflow.run import DEFAULT_CACHE, RunConfig
from zeroflow.sweep import SweepConfig
from zeroflow.ui import UiConfig

if TYPE_CHECKING:
    from zeroflow.data.lookup import Piece
    from zeroflow.orchestration import RunFlow

log = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=BaseModel)

_ALIASES = {"size": ["--model-size"]}


class Setting(NamedTuple):
    """A leaf of a settings class and where it lies."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def flag(self) -> str:
        return "--" + self.path[-1].replace("_", "-")


def settings(config: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every single setting of `config`, groups unfolded."""
    for name, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, (*path, name))
        else:
            yield Setting((*path, name), field)


def add_settings(parser: argparse.ArgumentParser, config: type[BaseModel], title: str) -> None:
    """Give `parser` a flag for every setting, in a group for every class."""
    groups: dict[tuple[str, ...], Any] = {}
    for setting in settings(config):
        where = setting.path[:-1]
        if where not in groups:
            owner = _owner(config, where)
            summary = (owner.__doc__ or "").strip().split("\n\n")[0]
            groups[where] = parser.add_argument_group(where[-1] if where else title, summary)
        _add_flag(groups[where], setting)


def read_settings(config: type[BaseModel], arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given on the command line, nested as `config` is."""
    values: dict[str, Any] = {}
    for setting in settings(config):
        given = getattr(arguments, _destination(setting))
        if given is None:
            continue
        target = values
        for name in setting.path[:-1]:
            target = target.setdefault(name, {})
        target[setting.path[-1]] = given
    return values


def flags(config: BaseModel) -> list[str]:
    """What on the command line asks for all that `config` was given."""
    argv = []
    for setting in settings(type(config)):
        given: Any = config
        for name in setting.path:
            given = getattr(given, name) if given and name in given.model_fields_set else None
        if isinstance(given, bool):
            if given:
                argv.append(setting.flag)
            elif setting.field.default is None:
                argv.append(setting.flag.replace("--", "--no-", 1))
        elif isinstance(given, tuple):
            argv += [setting.flag, *map(str, given)] if given else []
        elif given is not None:
            argv.append(f"{setting.flag}={given}")
    return argv


def complaint(error: Exception) -> str:
    """An error as one message to a person; settings by their flags."""
    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    lines = []
    for problem in error.errors():
        names = [str(part) for part in problem["loc"]]
        message = problem["msg"].removeprefix("Value error, ")
        if names and problem["type"] != "value_error":
            flag = "--" + names[-1].replace("_", "-")
            message = f"{flag}: {message} (found {problem['input']!r})"
        lines.append(message)
    return "\n".join(lines)


def run_flow(flow: "RunFlow", argv: Sequence[str] | None = None) -> int:
    """The command of a flow: parse, have a Prefect server, run, and say how it ended."""

    def start(run: RunConfig) -> str:
        from zeroflow import orchestration

        report = orchestration.run_here(flow, run, deployment=settling.size_of(run))
        return _ending(report, run.cache_dir)

    description = (
        "Raw text to a trained and checked LLaMA-style language model.\n\n"
        "  python flows/pretrain.py                    a few minutes on any machine\n"
        "  python flows/pretrain.py --size small       on a GPU, FineWeb-Edu\n"
        "  python flows/pretrain.py --data-mode files --data-path 'books/*.txt'\n\n"
        "The same command again goes on where it stopped, or shows what it made."
    )
    return _with_prefect(RunConfig, "run", description, argv, lambda run: run.cache_dir, start)


def run_sweep(flow: "RunFlow", argv: Sequence[str] | None = None) -> int:
    """The command of the sweep's flow, like `run_flow`."""

    def start(sweep: SweepConfig) -> str:
        from zeroflow import orchestration, prefect_server

        page = orchestration.run_here(flow, sweep, deployment=prefect_server.SWEEP_DEPLOYMENT)
        return page.read_text(encoding="utf-8")

    description = (
        "Train several sizes, seeds or learning rates one after the other, and compare them.\n\n"
        "  python flows/sweep.py --sizes tiny small medium\n"
        "  python flows/sweep.py --size tiny --seeds 0 1 2 --max-steps 100\n\n"
        "All other settings are those of a run, and the same for all. The same command again goes\n"
        "on where it stopped, or shows what it made."
    )
    return _with_prefect(
        SweepConfig, "sweep", description, argv, lambda sweep: sweep.run.cache_dir, start
    )


def _with_prefect(
    config: type[Settings],
    title: str,
    description: str,
    argv: Sequence[str] | None,
    cache_of: Callable[[Settings], Path],
    start: Callable[[Settings], str],
) -> int:
    """Read settings from the command line and `start` with a Prefect server; an exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # a misspelt flag is an error
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
    )
    add_settings(parser, config, title)
    parser.add_argument(
        "--verbose", action="store_true", help="tracebacks, and Prefect's own lines"
    )
    arguments = parser.parse_args(argv)
    try:
        asked = config.model_validate(read_settings(config, arguments))
    except ValidationError as error:
        return _fail(error, verbose=arguments.verbose, code=2)
    # they take seconds to import: after --help and wrong flags
    from zeroflow import orchestration, prefect_server

    if not arguments.verbose:
        orchestration.silence_console()
    _log_to_console(verbose=arguments.verbose)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _require_writable(cache_of(asked))
        with prefect_server.server() as address:
            log.info("Prefect UI: %s", address)
            ending = start(asked)
        console.print(ending, markup=False)
        return 0
    except (KeyboardInterrupt, _Terminated) as stop:
        console.print("stopped; what is complete is kept, and the same command goes on from there")
        return 143 if isinstance(stop, _Terminated) else 130
    except Exception as error:
        if not isinstance(error, ValueError):  # of which the same command would only get another
            error.add_note(f"retry: {shlex.join(sys.orig_argv)}")
        return _fail(error, verbose=arguments.verbose)


def main(
    argv: Sequence[str] | None = None, *, prove: Callable[[ProofRun], Path] = proof.prove
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
    _log_to_console(verbose=arguments.verbose)
    try:
        if arguments.command == "prove-resume":
            asked = ProofRun.model_validate(read_settings(ProofRun, arguments))
            _require_writable(asked.run.cache_dir)
            page = prove(asked)
            console.print(page.read_text(encoding="utf-8"), f"{page}", sep="\n", markup=False)
        else:
            _COMMANDS[arguments.command](arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _fail(error, verbose=arguments.verbose)


def _generate(arguments: argparse.Namespace) -> None:
    from zeroflow import generate

    sampling = SamplingConfig.model_validate(read_settings(SamplingConfig, arguments))
    trained = _load(arguments)
    if trained.tokenizer.path is None:
        if arguments.prompt:
            raise ValueError(f"run {arguments.run} was trained on token ids: it takes no --prompt")
        ids = generate.complete_ids(
            trained.model, trained.tokenizer, sampling, context=trained.context
        )
        text = " ".join(map(str, ids))
    else:
        text = generate.complete(
            trained.model, trained.tokenizer, arguments.prompt, sampling, context=trained.context
        )
    console.print(text, markup=False)


def _export(arguments: argparse.Namespace) -> None:
    from zeroflow import export

    trained = _load(arguments)
    export.export(trained.model, trained.tokenizer, arguments.out, context=trained.context)
    console.print(f"{arguments.out}", markup=False)


def _data(arguments: argparse.Namespace) -> None:
    from zeroflow import report, results

    job = results.job(arguments.cache_dir, arguments.run)
    page = report.write_data(job.shards, job.tokenizer, job.run_dir)
    console.print(page.read_text(encoding="utf-8"), markup=False)
    console.print(f"{page}", markup=False)


def _plan(arguments: argparse.Namespace) -> None:
    from zeroflow import plan, plan_page

    asked = RunConfig.model_validate(read_settings(RunConfig, arguments))
    planned = plan.offline(asked, gpu=arguments.gpu)
    shown = planned.model_dump_json(indent=2) if arguments.json else plan_page.text(planned)
    console.print(shown, markup=False)


def _prefect_setup(arguments: argparse.Namespace) -> None:
    from zeroflow import prefect_server

    prefect_server.set_up()


def _ui(arguments: argparse.Namespace) -> None:
    from zeroflow import ui

    config = UiConfig.model_validate(read_settings(UiConfig, arguments))
    _require_writable(config.cache_dir)
    signal.signal(signal.SIGTERM, _terminate)
    with suppress(KeyboardInterrupt, _Terminated):  # the way to stop it
        ui.serve(config)


def _documents(arguments: argparse.Namespace) -> None:
    from zeroflow import results

    asked = (arguments.cache_dir, arguments.run, arguments.step)
    pieces, gone = results.documents(*asked), results.left_out(*asked)
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
    from zeroflow import results

    return results.load(arguments.cache_dir, arguments.run)


class _Terminated(SystemExit):
    """SIGTERM has come."""


def _terminate(number: int, frame: object) -> None:
    """End as after Ctrl-C; Prefect sends itself the signal again once the flow run has ended."""
    raise _Terminated(128 + number)


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to {folder.absolute()} ({error.strerror}): name another "
            "--cache-dir"
        ) from error


class _Lines(logging.StreamHandler[TextIO]):
    """Lines on standard output, for as long as somebody reads them: a run outlives `| head`."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if isinstance(sys.exception(), BrokenPipeError):
            sys.stdout = self.stream = open(os.devnull, "w")  # noqa: SIM115, PTH123, to the end
        else:
            super().handleError(record)


def _log_to_console(*, verbose: bool) -> None:
    """Plain lines on standard output; around the live bar where there is a terminal."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_level=False, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = _Lines(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("zeroflow")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def _ending(report: Path, cache: Path) -> str:
    from zeroflow import results

    return results.summary(report, cache)


def _fail(error: Exception, *, verbose: bool, code: int = 1) -> int:
    if verbose:
        logging.getLogger("zeroflow").error("failed", exc_info=error)
    notes = getattr(error, "__notes__", [])
    sys.stderr.write("\n".join([f"error: {complaint(error)}", *notes, ""]))
    return code


def _owner(config: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel]:
    for name in path:
        annotation = config.model_fields[name].annotation
        assert isinstance(annotation, type)
        config = annotation
    return config


def _destination(setting: Setting) -> str:
    return "setting_" + "_".join(setting.path)


def _add_flag(group: Any, setting: Setting) -> None:
    field, default = setting.field, setting.field.default
    text = " ".join((field.description or "").split()).replace("%", "%%")
    if default not in (None, "", (), False):
        text = f"{text} Default: {default}.".strip()
    flags = [setting.flag, *_ALIASES.get(setting.path[-1], [])]
    options: dict[str, Any] = {"dest": _destination(setting), "default": None, "help": text}
    kinds = _kinds(field.annotation)
    if bool in kinds:
        # Only a setting that is not simply off needs a way to say no
        options["action"] = argparse.BooleanOptionalAction if default is None else "store_true"
    elif tuple in kinds:
        item = _kinds(get_args(field.annotation)[0])[0]
        options |= {"nargs": "+", "metavar": _METAVARS.get(setting.path[-1], _metavar(item))}
        if isinstance(item, list):
            options["choices"] = item
            del options["metavar"]
    elif choices := [value for kind in kinds if isinstance(kind, list) for value in kind]:
        options["choices"] = choices
    else:
        options["metavar"] = _metavar(kinds[0])
    group.add_argument(*flags, **options)


_METAVARS = {"data_path": "GLOB"}


def _metavar(kind: Any) -> str:
    return (
        "NAME" if isinstance(kind, list) else {int: "N", float: "X", Path: "DIR"}.get(kind, "NAME")
    )


def _kinds(annotation: Any) -> list[Any]:
    """The plain types in an annotation; the choices of a Literal as a list."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [list(get_args(annotation))]
    if origin in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return [kind for part in parts for kind in _kinds(part)]
    if origin is tuple:
        return [tuple]
    return [get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation]


def entry() -> None:
    raise SystemExit(main())


if __name__ == "__main__":
    entry()
