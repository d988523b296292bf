"""MLflow's server, which shows the runs, and the addresses of its pages."""

import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

from zeroflow.records import Record
from zeroflow.run_folder import RunFolder
from zeroflow.text.redaction import redacted, without_login
from zeroflow.tracking.config import PORT, address, is_server, location
from zeroflow.tracking.store import open_store, run_ids

log = logging.getLogger(__name__)

_ADDRESS_FILE = "address.json"

_TRAINING = "workflowType=machine_learning"
"""Selects the pages for model training. By default, MLflow opens those for language applications,
which have no curves."""

# Sorted by bits per byte, because losses depend on the tokenizer. Sorted by time, MLflow would fold
# the runs of a sweep under the sweep, even in charts
_SORTED = "orderByKey=metrics.%60loss%2Fval_bpb%60&orderByAsc=true"

_LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
"""Options that reduce the server's memory to a sixth."""

_HOSTS = "MLFLOW_SERVER_ALLOWED_HOSTS"

_CHECKED = {_HOSTS: "127.0.0.1,127.0.0.1:*,localhost,localhost:*"}
"""Host names that requests may use, unless the user has set others: MLflow's default also admits
private networks. By default, only pages of this machine may change anything."""


class _Address(Record):
    """Address at which the viewer was last started."""

    address: str


class Viewer(NamedTuple):
    """MLflow's server, which shows the runs."""

    address: str
    experiment_id: str
    command: list[str] | None = None
    """Command that starts it; None for the server at MLFLOW_TRACKING_URI."""

    environment: dict[str, str] | None = None
    """Environment of the command."""

    @property
    def hosts(self) -> str:
        """Host names for which the server answers requests."""
        return (self.environment or {}).get(_HOSTS, "")

    @property
    def runs(self) -> str:
        """Address of the page that lists all runs."""
        return _page(self.address, self.experiment_id, "runs", _SORTED)

    @property
    def charts(self) -> str:
        return charts_page(self.address, self.experiment_id)


def viewer(cache: Path, port: int) -> Viewer:
    """Return the viewer for the runs of `cache`; the store is created if it does not exist.

    The address is recorded, so that runs link to pages on `port` from now on.

    Raises:
        RuntimeError: the store at MLFLOW_TRACKING_URI cannot be opened.
    """
    uri, folder = location(cache)
    try:
        _, experiment_id = open_store(folder)
    except Exception as error:  # any failure of the server or its database
        if folder is not None:
            raise
        reason = redacted((str(error) or type(error).__name__).splitlines()[0])
        raise RuntimeError(
            f"MLflow at MLFLOW_TRACKING_URI {uri} cannot be opened ({reason}): start that server, "
            "or unset the variable to use the store in the cache folder"
        ) from error
    if is_server(uri):
        return Viewer(without_login(address(folder)), experiment_id)
    if folder is not None:
        _Address(address=local_address(port)).write(folder / _ADDRESS_FILE)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    # Not an argument: `ps` would show its password to all users of the machine
    store = {"MLFLOW_BACKEND_STORE_URI": address(folder)}
    environment = _CHECKED | os.environ | _LEAN | store
    return Viewer(local_address(port), experiment_id, command, environment)


def links(folder: RunFolder) -> dict[str, str]:
    """Return links to MLflow's pages by subject; empty for a run that is not in MLflow."""
    if (ids := run_ids(folder)) is None:
        return {}
    uri, store = location(folder.cache.path)
    server = without_login(address(store)) if is_server(uri) else local_address(PORT)
    if store is not None and (noted := _noted_address(store / _ADDRESS_FILE)):
        server = noted.address
    return {
        "this run": _page(server, ids.experiment_id, f"runs/{ids.run_id}"),
        "loss of all runs": charts_page(server, ids.experiment_id),
    }


def _noted_address(file: Path) -> _Address | None:
    try:
        return _Address.read_if_exists(file)
    except ValueError as error:  # a complete run must not fail because of a link
        log.warning("the links to MLflow may be wrong until `zeroflow ui` runs: %s", error)
        return None


def local_address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def charts_page(address: str, experiment_id: str) -> str:
    """Return the address of the page with all runs in one chart."""
    return _page(address, experiment_id, "runs", "compareRunsMode=CHART", _SORTED)


def _page(address: str, experiment_id: str, page: str, *options: str) -> str:
    return f"{address}/#/experiments/{experiment_id}/{page}?{'&'.join((_TRAINING, *options))}"
