"""Where a run shows its progress and its pages."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from zeroflow.data.builders import BuildPart
from zeroflow.report.pages import Page
from zeroflow.report.progress import Show
from zeroflow.settings.alerts import Noticed
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settled import Settled
from zeroflow.settings.sweep import SweepConfig


class View:
    """Display of progress and pages. Here, pages are files of the run and progress is logged.

    A subclass also shows them elsewhere, see `orchestration.view`.
    """

    def name_run(self, asked: RunConfig, run: Settled) -> None:
        """Called when `asked` has been settled to `run`, which is shown from now on."""

    def name_sweep(self, sweep: SweepConfig) -> None:
        """Called when `sweep` begins, which is shown from now on."""

    def tags(self) -> dict[str, str]:
        """MLflow tags that identify this view."""
        return {}

    def progress(self, subject: str) -> Show:
        """Return a function to call with the fraction done, from 0 to 1, and a line of text."""
        return lambda share, text: None

    def page(self, page: Page, subject: str) -> None:
        """Show a finished page."""

    def live_plot(self, subject: str) -> Callable[[Path], None]:
        """Return a function to call with each new version of a PNG file."""
        return lambda plot: None

    def alert(self, condition: Noticed, message: str) -> None:
        """Called when an alert condition is met."""

    def part_builder(self, build: BuildPart) -> BuildPart:
        """Return `build`, or a function that also shows each part that it builds."""
        return build

    def gpu_slot(self) -> AbstractContextManager[None]:
        """Return a context to stay in while the run uses GPUs."""
        return nullcontext()


LOG_ONLY = View()
