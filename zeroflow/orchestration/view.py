"""The view of a run in Prefect: names, tags, pages, progress, and the GPU slot."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from zeroflow.data.builders import BuildPart
from zeroflow.orchestration import alerts, flow_context, pages
from zeroflow.orchestration.gpu_slot import gpu_slot
from zeroflow.orchestration.stages import part_task
from zeroflow.pipeline import View
from zeroflow.report.pages import Page
from zeroflow.report.progress import Show
from zeroflow.run_folder import RunFolder
from zeroflow.settings.alerts import Noticed
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settled import Settled
from zeroflow.settings.sweep import SweepConfig


class PrefectView(View):
    """Shows a run on the page of its flow run."""

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        """Folder of the run, once its settings are settled."""

        self._name = ""

    def name_run(self, asked: RunConfig, run: Settled) -> None:
        self.folder, self._name = run.folder, run.run_name
        flow_context.name_flow_run(asked, run)

    def name_sweep(self, sweep: SweepConfig) -> None:
        self._name = sweep.name

    def tags(self) -> dict[str, str]:
        return flow_context.tags()

    def progress(self, subject: str) -> Show:
        return pages.ProgressBar(subject, self._name)

    def page(self, page: Page, subject: str) -> None:
        pages.publish(page, subject, self._name)

    def live_plot(self, subject: str) -> Callable[[Path], None]:
        return pages.LivePlot(subject, self._name)

    def alert(self, condition: Noticed, message: str) -> None:
        alerts.emit(condition, self._name, message)

    def part_builder(self, build: BuildPart) -> BuildPart:
        return part_task(build)

    def gpu_slot(self) -> AbstractContextManager[None]:
        return gpu_slot()
