"""Entry point of the program `zeroflow`: prints the first line, then runs the command."""

import sys

from zeroflow.cli.first_line import announce

_LONG = {"pretrain", "sweep", "prove-resume", "ui"}
"""Commands that print log lines. The output of the others is for other programs."""


def entry() -> None:
    if _LONG & {*sys.argv[1:2]}:
        announce(sys.argv[2:])
    from zeroflow.cli.commands import main

    raise SystemExit(main())
