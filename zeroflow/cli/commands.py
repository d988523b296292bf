"""The `zeroflow` command: train, plan a run, use its results, start the user interfaces."""

import json
import logging
import signal
import sys
from argparse import Namespace as Arguments
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zeroflow.cli import flow
from zeroflow.cli.arguments import (
    Parser,
    add_settings,
    any_number,
    positive_number,
    read_settings,
    whole_number,
)
from zeroflow.cli.console import (
    Terminated,
    fail,
    log_to_console,
    page_text,
    require_writable,
    show,
    show_piece,
    terminate,
)
from zeroflow.cli.prefect_settings import importing_prefect
from zeroflow.inference.evaluation import EvaluationConfig
from zeroflow.orchestration.names import PRETRAIN, SWEEP, ZERO_LAB
from zeroflow.orchestration.ui import UiConfig
from zeroflow.run_folder import DEFAULT_CACHE
from zeroflow.settings.alerts import AlertConfig
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.text.markup import one_line, shortened, visible
from zeroflow.tracking import loopback
from zeroflow.training.sampling import SamplingConfig
from zeroflow.units import count

if TYPE_CHECKING:
    from zeroflow.data.provenance import Piece
    from zeroflow.inference.generate import TextGenerator
    from zeroflow.training.checkpoint import Which

_WIDTH = 60
"""Maximum number of characters of a text in a table."""

log = logging.getLogger(__name__)


class _Command(NamedTuple):
    name: str
    help: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[Arguments], None]
    description: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `zeroflow` command; the commands of flows end this process.

    Returns:
        Exit code: 0, 1 for a failure, 130 after Ctrl-C.
    """
    loopback.bypass_proxies()
    arguments = parser()[0].parse_args(argv)
    if arguments.command in _FLOWS:
        flow.run(arguments.command, arguments)
    is_json = getattr(arguments, "json", False)  # then standard output has nothing else
    log_to_console(verbose=arguments.verbose, output=sys.stderr if is_json else None)
    try:
        arguments.run_command(arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return fail(error, verbose=arguments.verbose)


def parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of `zeroflow`, and that of each command."""
    parser = Parser(prog="zeroflow", description="Train language models and use them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _FLOWS.items():
        flow.add_arguments(name, commands.add_parser(name, help=text))
    for command in _COMMANDS:
        added = commands.add_parser(
            command.name, help=command.help, description=command.description
        )
        command.add_arguments(added)
        added.add_argument("--verbose", action="store_true", help="show tracebacks")
        added.set_defaults(run_command=command.run)
    return parser, commands.choices


def entry() -> None:
    raise SystemExit(main())


def _of_a_run(parser: Parser, *, required: bool = True) -> None:
    parser.add_argument("--run", required=required, help="name of the run", metavar="NAME")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=DEFAULT_CACHE,
        help=f"cache folder of the run. Default: {DEFAULT_CACHE}.",
        metavar="DIR",
    )


def _of_a_checkpoint(parser: Parser, *, required: bool = True) -> None:
    """Add the flags that name a checkpoint of a run; `_which` reads the last two."""
    _of_a_run(parser, required=required)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step",
        type=whole_number,
        metavar="N",
        help="step of the checkpoint. Default: the newest.",
    )
    which.add_argument(
        "--best", action="store_true", help="use the checkpoint with the lowest validation loss"
    )


def _which(arguments: Arguments) -> "Which":
    if arguments.best:
        return "best"
    return "newest" if arguments.step is None else arguments.step


def _generate_arguments(parser: Parser) -> None:
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument("--prompt", default="", help="beginning of the text")
    beginning.add_argument(
        "--interactive", action="store_true", help="read prompts, one on each line, until Ctrl-D"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end before the first occurrence of this text; may be repeated",
        metavar="TEXT",
    )
    parser.add_argument(
        "--samples",
        type=positive_number,
        default=1,
        help="number of texts; each has the seed of the one before, plus 1. Default: 1.",
        metavar="N",
    )
    parser.add_argument(
        "--from",
        dest="folder",
        type=Path,
        help="use an exported folder, or another one that transformers opens, instead of a run",
        metavar="DIR",
    )
    add_settings(parser, SamplingConfig, "sampling")
    _of_a_checkpoint(parser, required=False)


def _generate(arguments: Arguments) -> None:
    from zeroflow.inference.generate import remark_on

    config = SamplingConfig.model_validate(read_settings(SamplingConfig, arguments))
    generator = _generator(arguments)
    texts = [config.replace(seed=config.seed + number) for number in range(arguments.samples)]
    for prompt in _prompts() if arguments.interactive else [arguments.prompt]:
        remark_on(prompt)
        for number, each in enumerate(texts, 1):
            if len(texts) > 1:
                show_piece(f"--- text {number} of {len(texts)}, seed {each.seed}\n")
            pieces = generator.stream(prompt, each, arguments.stop)
            show_piece(prompt)
            with suppress(*[KeyboardInterrupt] * arguments.interactive):  # ends only this text
                for piece in pieces:
                    show_piece(piece)
            show_piece("\n")


def _generator(arguments: Arguments) -> "TextGenerator":
    from zeroflow.inference import generate, trained

    if arguments.folder is None:
        if arguments.run is None:
            raise ValueError("name a model: --run NAME, or --from DIR")
        return trained.load(arguments.cache_dir, arguments.run, _which(arguments)).generator
    if arguments.run or arguments.step is not None or arguments.best:
        raise ValueError("--from names a folder, and --run, --step and --best have no effect")
    return generate.of_folder(arguments.folder)


def _prompts() -> Iterator[str]:
    """Yield the lines of standard input until its end or, in a terminal, Ctrl-C."""
    mark = "> " if sys.stdin.isatty() else ""
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            try:
                line = input(mark)
            except UnicodeDecodeError as error:
                raise ValueError("a prompt is not UTF-8: encode the input as UTF-8") from error
            yield line


def _export_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--out", type=Path, help="new folder; may be left out with --register", metavar="DIR"
    )
    parser.add_argument(
        "--format",
        choices=("hf", "gguf"),
        default="hf",
        help="hf: for transformers and vLLM. gguf: for llama.cpp and Ollama. Default: hf.",
    )
    parser.add_argument(
        "--push",
        help="also upload the folder to this repository on the Hugging Face Hub, which is created "
        "as a private one",
        metavar="OWNER/NAME",
    )
    parser.add_argument(
        "--register",
        help="also register the model in MLflow, as a version of the model with this name",
        metavar="NAME",
    )
    _of_a_checkpoint(parser)


def _export(arguments: Arguments) -> None:
    from zeroflow.inference import push
    from zeroflow.inference.export import require_new
    from zeroflow.run_folder import Cache

    if arguments.register:
        # As in a run, whose settings have the rules for names
        RunConfig.model_validate({"register_": arguments.register})
        if arguments.format != "hf":
            raise ValueError(f"--register needs --format hf, not {arguments.format}: drop one")
    if arguments.out is None and (arguments.push or not arguments.register):
        raise ValueError("name a new folder with --out")
    if arguments.out is not None:
        require_new(arguments.out)
    if arguments.push:
        push.require_name(arguments.push)
        push.require_login()
    which = _which(arguments)
    if arguments.out is not None:
        which = _export_to_folder(arguments, which)
        show(f"{arguments.out}")
    if arguments.push:
        show(push.push(arguments.out, arguments.push))
    if arguments.register:
        from zeroflow.report import registration

        folder = Cache(arguments.cache_dir).run(arguments.run)
        found = registration.register(folder, arguments.register, which, exported=arguments.out)
        show(f"{found}")


def _export_to_folder(arguments: Arguments, which: "Which") -> int:
    """Write the model and its card, and return the step of its checkpoint."""
    from zeroflow.inference import trained as models
    from zeroflow.inference.export import export
    from zeroflow.report.model_card import model_card
    from zeroflow.report.outcome import failures
    from zeroflow.run_folder import Cache

    trained = models.load(arguments.cache_dir, arguments.run, which)
    folder = Cache(arguments.cache_dir).run(trained.run)
    export(
        trained.model,
        trained.tokenizer,
        arguments.out,
        context=trained.context,
        name=trained.run,
        format=arguments.format,
        card=model_card(folder, step=trained.step, format=arguments.format),
    )
    for why in failures(folder):
        log.warning("the run failed: %s", why)
    return trained.step


def _evaluate_arguments(parser: Parser) -> None:
    add_settings(parser, EvaluationConfig, "evaluation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _of_a_checkpoint(parser)


def _evaluate(arguments: Arguments) -> None:
    from zeroflow.inference.evaluate import EvaluationJob, evaluate
    from zeroflow.report import evaluation_page, run_report
    from zeroflow.report.pages import Page
    from zeroflow.run_folder import Cache

    config = EvaluationConfig.model_validate(read_settings(EvaluationConfig, arguments))
    cache, run = arguments.cache_dir, arguments.run
    found = evaluate(EvaluationJob(cache=cache, run=run, which=_which(arguments), config=config))
    run_report.add_evaluation(Cache(cache).run(run), found)
    if arguments.json:
        show(found.model_dump_json(indent=2))
    else:
        show(page_text(Page(tuple(evaluation_page.tables(found))).linked))


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
    _of_a_run(parser)


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


def _prefect_setup_arguments(parser: Parser) -> None:
    add_settings(parser, AlertConfig, "alerts")


def _prefect_setup(arguments: Arguments) -> None:
    alerts = AlertConfig.model_validate(read_settings(AlertConfig, arguments))
    with importing_prefect():
        from zeroflow.orchestration import deployments

    deployments.set_up(alerts=alerts)
    show(f"command that creates the deployments there: {deployments.DEPLOY}")


def _ui_arguments(parser: Parser) -> None:
    add_settings(parser, UiConfig, "ui")


def _ui(arguments: Arguments) -> None:
    from zeroflow.orchestration import ui

    config = UiConfig.model_validate(read_settings(UiConfig, arguments))
    require_writable(config.cache_dir)
    signal.signal(signal.SIGTERM, terminate)
    with importing_prefect():
        from zeroflow.orchestration import server as _  # noqa: F401, its errors are explained here
    with suppress(KeyboardInterrupt, Terminated):  # the normal way to stop the command
        ui.serve(config)


_FLOWS = {
    PRETRAIN: "train and check a model",
    SWEEP: "train several models and compare them",
    ZERO_LAB: "measure the stages of ZeRO: memory, communication, speed and losses",
}

_COMMANDS = (
    _Command("generate", "print text that a model generates", _generate_arguments, _generate),
    _Command(
        "export",
        "write a model for transformers, vLLM, llama.cpp or Ollama",
        _export_arguments,
        _export,
    ),
    _Command(
        "evaluate",
        "score a run's model on texts and tasks",
        _evaluate_arguments,
        _evaluate,
        "Score a checkpoint: loss, bits per byte and perplexity on texts, and accuracy on tasks of "
        "lm-evaluation-harness and on CORE. Without any, the held-out rows of the run are scored.",
    ),
    _Command("data", "show the contents of a run's rows", _of_a_run, _data),
    _Command(
        "documents", "list the documents that a step trains on", _documents_arguments, _documents
    ),
    _Command(
        "plan",
        "predict memory, time and disk space of a run",
        _plan_arguments,
        _plan,
        "Predict parameters, FLOPs, memory, time and disk space of the run that the same flags "
        "would start. The command may send requests to the Hub. It builds and records nothing.",
    ),
    _Command(
        "shards",
        "build the shards of a run, together with other processes",
        _shards_arguments,
        _shards,
        "Build only the shards of a run. Any number of these commands with the same settings "
        "divide the parts among them, on all machines that share the cache folder. If one dies, "
        "another takes over its parts after a minute.",
    ),
    _Command(
        "prove-resume",
        "prove that training that was killed resumes bit for bit",
        _prove_arguments,
        _prove,
        "Train twice, once undisturbed and once with repeated kills, and compare every bit. "
        "The defaults are small: a minute or two on a CPU.",
    ),
    _Command(
        "prefect-setup",
        "set up a Prefect server's work pool, crash detection and alerts",
        _prefect_setup_arguments,
        _prefect_setup,
        "Create the work pool, the limit of one GPU job at a time and the crash detection on a "
        "Prefect server. With --alert-to, the server also sends messages about runs. Without flags "
        "for alerts, existing alerts stay as they are.",
    ),
    _Command(
        "ui",
        "start Prefect's and MLflow's user interfaces, and a worker",
        _ui_arguments,
        _ui,
        "Start Prefect's server with a form for each size, a worker for the runs that are started "
        "there, and MLflow. Ctrl-C stops everything.",
    ),
)
