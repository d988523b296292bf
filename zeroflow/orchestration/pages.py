"""Pages, plots and progress bars on the page of a flow run."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from zeroflow.orchestration.flow_context import reachable
from zeroflow.report.pages import Page, Plot
from zeroflow.text.markup import escaped

log = logging.getLogger(__name__)

_BAR_SECONDS = 5.0
"""Minimum time between two updates of a progress bar."""

_BAR_RETRY_SECONDS = 60.0
"""Minimum time between a failed update and the next."""


def publish(page: Page, subject: str, run_name: str) -> None:
    """Show `page` on the flow run's page. A failure is only logged, because the page is on disk."""
    try:
        if not reachable():
            raise ConnectionError("its server does not answer")  # Prefect would retry for a minute
        create_markdown_artifact(
            page.embedded,
            key=_key(subject, run_name),
            description=escaped(f"{subject} of {run_name}"),  # Prefect shows it as Markdown
        )
    except Exception as error:
        log.warning("cannot show the %s in Prefect: %s", subject, error)


class _Live:
    """An artifact on the flow run's page that is updated. Consecutive failures log one warning."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._id: UUID | None = None
        self._failing = False

    def put(self, create: Callable[[], Any], update: Callable[[UUID], Any]) -> bool:
        """Create the artifact, or update it if it exists.

        Returns:
            True if that worked.
        """
        try:
            if not reachable():
                raise ConnectionError("its server does not answer")
            if self._id is None:
                self._id = create()
            else:
                update(self._id)
            self._failing = False
        except Exception as error:  # the content is also in the log or on disk
            if not self._failing:
                log.warning("cannot show %s in Prefect: %s", self._what, error)
            self._failing = True
        return not self._failing


class LivePlot:
    """A plot on the page of the flow run; each new version replaces it."""

    def __init__(self, subject: str, run_name: str) -> None:
        self._subject, self._run_name = subject, run_name
        self._live = _Live(f"the plot of {subject}")

    def __call__(self, plot: Path) -> None:
        # As Markdown, because for an image artifact, Prefect also prints the whole data URI
        page = Page((Plot(plot, self._subject),))
        self._live.put(
            lambda: create_markdown_artifact(
                page.embedded,
                key=_key(f"{self._subject}-live", self._run_name),
                description=escaped(f"{self._subject} of {self._run_name} while it is trained"),
            ),
            lambda shown: _update_artifact(shown, page.embedded),
        )


def _update_artifact(artifact: UUID, data: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, ArtifactUpdate(data=data))


class ProgressBar:
    """A progress bar on the page of the flow run, updated every few seconds at most."""

    def __init__(self, subject: str, run_name: str) -> None:
        self._subject, self._key = subject, _key(f"{subject}-progress", run_name)
        self._live = _Live(f"progress of {subject}")
        self._next = 0.0

    def __call__(self, share: float, text: str) -> None:
        """Show the fraction done, from 0 to 1, and a line of text."""
        if time.monotonic() < self._next and share < 1:
            return
        percent, text = (
            round(100 * share, 1),
            f"{self._subject}: {text.removeprefix(f'{self._subject}: ')}",
        )
        shown = self._live.put(
            lambda: create_progress_artifact(percent, self._key, text),
            lambda bar: update_progress_artifact(bar, percent, text),
        )
        self._next = time.monotonic() + (_BAR_SECONDS if shown else _BAR_RETRY_SECONDS)


def _key(subject: str, run_name: str) -> str:
    """Return the key of an artifact, which consists of lower-case letters, digits and dashes."""
    lower = f"{subject}-{run_name}".lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in lower).strip("-")
