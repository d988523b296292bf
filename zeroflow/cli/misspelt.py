"""Flags that do not exist, and the flags that were meant: checked before libraries are imported."""

import sys
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from zeroflow.cli.flag_names import FLAGS


def refuse_unknown(command: str, arguments: Sequence[str], program: str) -> None:
    """Exit like the command's parser, which takes seconds to import, if a flag does not exist.

    Args:
        program: the command as the user types it.
    """
    flags = FLAGS[command]
    for argument in arguments:
        if argument == "--":
            return
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in flags and " " not in argument:
            sys.stderr.write(refusal(f"there is no {name}{meant(name, flags)}", program) + "\n")
            raise SystemExit(2)


def refusal(message: str, program: str) -> str:
    return f"error: {message}\n`{program} --help` shows what it takes"


def meant(name: str, flags: Collection[str]) -> str:
    """Return the end of an error message with the flags that are similar to `name`, or ""."""
    word, words = name.strip("-").replace("_", "-"), [flag.strip("-") for flag in flags]
    near = [f"--{found}" for found in get_close_matches(word, words, n=1)]
    near = near or [flag for flag in flags if word in (*flag.split("-"), _initials(flag))]
    return f": did you mean {' or '.join(near)}?" if near else ""


def _initials(flag: str) -> str:
    return "".join(word[:1] for word in flag.split("-"))
