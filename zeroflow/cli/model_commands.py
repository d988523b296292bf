"""Commands that use the model of a run: generate, export and evaluate."""

import logging
import sys
from argparse import Namespace as Arguments
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from zeroflow.cli.arguments import Parser, add_settings, positive_number, read_settings
from zeroflow.cli.command import Command, of_a_checkpoint, which
from zeroflow.cli.console import page_text, show, show_piece
from zeroflow.inference.evaluation import EvaluationConfig
from zeroflow.settings.run_config import RunConfig
from zeroflow.training.sampling import SamplingConfig

if TYPE_CHECKING:
    from zeroflow.inference.generate import TextGenerator
    from zeroflow.training.checkpoint import Which

log = logging.getLogger(__name__)


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
    of_a_checkpoint(parser, required=False)


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
        return trained.load(arguments.cache_dir, arguments.run, which(arguments)).generator
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
    of_a_checkpoint(parser)


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
    chosen = which(arguments)
    if arguments.out is not None:
        chosen = _export_to_folder(arguments, chosen)
        show(f"{arguments.out}")
    if arguments.push:
        show(push.push(arguments.out, arguments.push))
    if arguments.register:
        from zeroflow.report import registration

        folder = Cache(arguments.cache_dir).run(arguments.run)
        found = registration.register(folder, arguments.register, chosen, exported=arguments.out)
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
    of_a_checkpoint(parser)


def _evaluate(arguments: Arguments) -> None:
    from zeroflow.inference.evaluate import EvaluationJob, evaluate
    from zeroflow.report import evaluation_page, run_report
    from zeroflow.report.pages import Page
    from zeroflow.run_folder import Cache

    config = EvaluationConfig.model_validate(read_settings(EvaluationConfig, arguments))
    config.refuse_what_does_nothing()
    cache, run = arguments.cache_dir, arguments.run
    found = evaluate(EvaluationJob(cache=cache, run=run, which=which(arguments), config=config))
    run_report.add_evaluation(Cache(cache).run(run), found)
    if arguments.json:
        show(found.model_dump_json(indent=2))
    else:
        show(page_text(Page(tuple(evaluation_page.tables(found))).linked))


COMMANDS = (
    Command("generate", "print text that a model generates", _generate_arguments, _generate),
    Command(
        "export",
        "write a model for transformers, vLLM, llama.cpp or Ollama",
        _export_arguments,
        _export,
    ),
    Command(
        "evaluate",
        "score a run's model on texts and tasks",
        _evaluate_arguments,
        _evaluate,
        "Score a checkpoint: loss, bits per byte and perplexity on texts, and accuracy on tasks of "
        "lm-evaluation-harness and on CORE. Without any, the held-out rows of the run are scored.",
    ),
)
