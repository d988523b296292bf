"""Output of a command, and its reaction to SIGTERM."""

import io
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from zeroflow.cli.first_line import TIME
from zeroflow.report.progress import console
from zeroflow.settings.flags import error_message
from zeroflow.text.markup import LineFormatter, is_for_now, visible


class Terminated(SystemExit):
    """Raised when SIGTERM arrives."""


def terminate(number: int, frame: object) -> None:
    """Handle SIGTERM like Ctrl-C. Prefect raises it again when the flow run has ended."""
    raise Terminated(128 + number)


def require_writable(folder: Path) -> None:
    """
    Raises:
        ValueError: nothing can be written to `folder`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder.absolute()} ({error.strerror}): name another --cache-dir"
        ) from error


class _LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines to standard output; if its reader exits, as in `| head`, the run continues."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if isinstance(sys.exception(), BrokenPipeError):
            sys.stdout = self.stream = open(os.devnull, "w")  # noqa: SIM115, PTH123, to the end
        else:
            super().handleError(record)


class _TerminalHandler(logging.Handler):
    """Prints lines above the live progress bar, without columns: the terminal wraps them."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record))


def show(text: str) -> None:
    """Print `text`; in a terminal, control characters as escapes."""
    console.print(visible(text) if console.is_terminal else text)


def show_piece(text: str) -> None:
    """Print `text` at once and without a line end; in a terminal, control characters as escapes."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def page_text(markdown: str) -> str:
    """Return a page as text for standard output."""
    from zeroflow.report.page_text import as_text  # its parser takes a while to import

    return as_text(markdown, console.width if console.is_terminal else None)


def log_to_console(*, verbose: bool, output: TextIO | None = None) -> None:
    """Log plain lines; in a terminal, above the live progress bar.

    Args:
        output: standard output by default.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack some of our characters
        sys.stdout.reconfigure(errors="backslashreplace")
    handler: logging.Handler = (
        _TerminalHandler()
        if console.is_terminal and output is None
        else _LineHandler(output or sys.stdout)
    )
    handler.setFormatter(LineFormatter("%(asctime)s  %(message)s", TIME))
    handler.addFilter(is_for_now)
    logger = logging.getLogger("zeroflow")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def fail(error: Exception, *, verbose: bool, code: int = 1) -> int:
    """Print `error` as one message, and return the exit code."""
    if verbose:
        logging.getLogger("zeroflow").error("failed", exc_info=error)
    notes = getattr(error, "__notes__", [])
    sys.stderr.write(visible("\n".join([f"error: {error_message(error)}", *notes, ""])))
    return code
