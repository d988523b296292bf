"""Work of a flow's command that begins before its libraries are imported, which takes seconds."""

from collections.abc import Sequence
from contextlib import suppress

from zeroflow.cli.first_line import announce


def begin(arguments: Sequence[str]) -> None:
    """Print the first line, and start Prefect's server if the command will need its own.

    The server takes as long to start as the libraries to import. If the settings turn out to be
    wrong, it ends with the command.

    Args:
        arguments: arguments of the command.
    """
    announce(arguments)
    if {"-h", "--help"} & {*arguments}:
        return
    from zeroflow.cli.prefect_settings import importing_prefect

    with suppress(RuntimeError, ValueError), importing_prefect():  # the command reports them later
        from zeroflow.orchestration import server

        server.start_early()
