"""The run in Weights & Biases: online with an account, otherwise in local files.

Online, a process of wandb uploads what it receives, and the server tells a resumed run its last
step, so that no step is sent twice. Offline, `wandb sync` uploads the files. A resumed run replaces
files that were not uploaded, and continues after the last step of those that were. As in MLflow,
uploaded steps that are trained again keep their first values.
"""

import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

from zeroflow.records import Record
from zeroflow.run_folder import RunFolder
from zeroflow.text.redaction import redacted
from zeroflow.tracking import loopback
from zeroflow.tracking.config import DESCRIPTION, EXPERIMENT, TrackingConfig
from zeroflow.tracking.points import NewPoints, Point

log = logging.getLogger(__name__)

OPEN_SECONDS = 10.0
"""Time in which the server must answer."""

UPLOAD_SECONDS = 15.0
"""Maximum time to wait for the upload at the end."""


class WandbRecord(Record):
    """The run in Weights & Biases: wandb.json."""

    id: str
    delivered: int = -1
    """Last step when all steps were last delivered; -1 if they never were."""

    offline: dict[str, int] = {}  # noqa: RUF012, pydantic copies it
    """Last step in each folder of an offline run."""


class WandbRun:
    """The run in Weights & Biases of a run in training: the destination of its points."""

    def __init__(self, config: TrackingConfig, folder: RunFolder) -> None:
        loopback.bypass_proxies()
        # Both are read at the import; wandb would also report its own errors to its developers
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        self._wandb, self._config, self._folder = wandb, config, folder
        self._record = WandbRecord.read_if_exists(folder.wandb) or WandbRecord(id=uuid4().hex[:8])
        self._run: Any = None
        self._step = 0
        """Last step that was sent; until one is sent, the first step to send."""

        self._has_points = False
        self._begin()

    def send(self, new: NewPoints) -> None:
        if new.from_start and self._has_points and self._run.offline:  # some of them were dropped
            self._run.finish()
            self._begin()
        for step, row in _rows(new.points):
            if step >= self._step:
                self._run.log(row, step=step)
                self._step, self._has_points = step, True
        if self._run.offline and self._has_points:
            last = {Path(self._run.dir).parent.name: self._step}
            self._note(offline=self._record.offline | last)

    def end(self, status: str) -> None:
        began = time.monotonic()
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
        if time.monotonic() - began >= UPLOAD_SECONDS:  # wandb gives up without an error
            self._wandb.teardown()
            raise TimeoutError(f"the upload did not end within {UPLOAD_SECONDS:g} s")
        self._note(delivered=self._step)

    def _begin(self) -> None:
        """Open the run."""
        folders = (self._folder.path / "wandb").glob(f"offline-run-*-{self._record.id}")
        uploaded = -1
        for path in folders:
            if list(path.glob("*.synced")):  # made by `wandb sync`
                uploaded = max(uploaded, self._record.offline.get(path.name, -1))
            else:
                shutil.rmtree(path)
        self._note()
        try:
            self._run = self._opened()
            self._log_place()
            self._step = max(self._run.step, uploaded + 1)
        except Exception:
            # Otherwise wandb refuses another attempt, because the id is in use
            self._wandb.teardown()
            raise
        self._has_points = False

    def _opened(self) -> Any:
        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None:
            has_account = self._wandb.login(prompt=False, verify=False)
            mode = "online" if has_account else "offline"
        config, place = self._config, self._folder.path
        (place / "wandb").mkdir(mode=0o700, exist_ok=True)  # it contains the settings of the run
        return self._wandb.init(
            id=self._record.id,
            resume=None if mode == "offline" else "allow",
            mode=mode,
            dir=place,
            project=os.environ.get("WANDB_PROJECT", EXPERIMENT),
            name=config.run_name,
            group=config.tags.get("sweep"),
            notes=config.tags.get(DESCRIPTION),
            config={name: redacted(value) for name, value in config.params.items()},
            settings=_settings(self._wandb),
        )

    def _log_place(self) -> None:
        if self._run.offline:
            files = shlex.quote(str(Path(self._run.dir).parent))
            log.info("curves for Weights & Biases are in files: wandb sync %s uploads them", files)
        else:
            log.info("curves in Weights & Biases: %s", self._run.url)

    def _note(self, **changes: object) -> None:
        self._record = self._record.replace(**changes)
        self._record.write(self._folder.wandb)


def is_complete(folder: RunFolder, last_step: int) -> bool:
    """Return True if all steps up to `last_step` were delivered."""
    record = WandbRecord.read_if_exists(folder.wandb)
    if record is None or record.delivered < last_step:
        return False
    return any((folder.path / "wandb").glob(f"*run-*-{record.id}"))


def _settings(wandb: Any) -> Any:
    """Return settings that disable what MLflow already has and what nobody has asked for."""
    return wandb.Settings(
        init_timeout=OPEN_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
        silent=True,
        reinit="create_new",  # a run of this process before may not have ended
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,  # the command line and the name of the user
        x_disable_stats=True,  # it also asks a service of the network
        x_save_requirements=False,
    )


def _rows(points: Iterable[Point]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the step and the values of each record; tokens and GFLOPs are columns of their own."""
    for when, group in groupby(points, lambda point: point.time):
        row: dict[str, float] = {"_timestamp": when}
        step = 0
        for point in group:
            if point.axis == "steps":
                row[point.key], step = point.value, point.step
            else:
                row[point.axis] = point.step
        yield step, row
