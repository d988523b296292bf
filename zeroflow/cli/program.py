"""The program `zeroflow`: its first line, and then its command."""

import sys

from zeroflow.cli.first_line import announce

_LONG = {"pretrain", "sweep", "prove-resume", "ui"}
"""Commands that log what they do; the output of the others is for pipes."""


def entry() -> None:
    if _LONG & {*sys.argv[1:2]}:
        announce(sys.argv[2:])
    from zeroflow.cli.commands import main

    raise SystemExit(main())
