"""A command of `zeroflow`, and the flags that name a run or a checkpoint."""

from argparse import Namespace as Arguments
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zeroflow.cli.arguments import Parser, whole_number
from zeroflow.run_folder import DEFAULT_CACHE

if TYPE_CHECKING:
    from zeroflow.training.checkpoint import Which


class Command(NamedTuple):
    name: str
    help: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[Arguments], None]
    description: str | None = None


def of_a_run(parser: Parser, *, required: bool = True) -> None:
    parser.add_argument("--run", required=required, help="name of the run", metavar="NAME")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=DEFAULT_CACHE,
        help=f"cache folder of the run. Default: {DEFAULT_CACHE}.",
        metavar="DIR",
    )


def of_a_checkpoint(parser: Parser, *, required: bool = True) -> None:
    """Add the flags that name a checkpoint of a run; `which` reads the last two."""
    of_a_run(parser, required=required)
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


def which(arguments: Arguments) -> "Which":
    if arguments.best:
        return "best"
    return "newest" if arguments.step is None else arguments.step
