"""The Prefect server of a run: an existing server, or one that is started for the run.

`python -m zeroflow.orchestration.server PORT` is the command that `early_server` starts.
"""

import logging
import os
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from prefect.context import get_settings_context, refresh_global_settings_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from zeroflow.orchestration import access, early_server
from zeroflow.orchestration.access import Api
from zeroflow.orchestration.early_server import USUAL_PORT, free_port
from zeroflow.orchestration.programs import Program
from zeroflow.text.redaction import redacted, without_login
from zeroflow.tracking import loopback
from zeroflow.training import interpreter

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Maximum time for a program to start."""

STOP_SECONDS = 20.0
"""Maximum time for a program to stop by itself."""

_POLL_SECONDS = 0.05
"""Time between two checks of a server that is starting."""

_started_here: set[str] = set()
"""APIs of servers that this process started for a run and stops at its end."""


@contextmanager
def server() -> Iterator[str]:
    """Use the server at PREFECT_API_URL, or one on this machine, or start one for the block.

    A server on this machine is expected at the usual port. A server that is started for a run
    listens on another port, so that no other run comes to depend on it. Prefect's own temporary
    server is not used: it loses records of short tasks, hangs on Ctrl-C and keeps running if the
    flow is killed.

    Yields:
        The address of its user interface.

    Raises:
        RuntimeError: the server at PREFECT_API_URL, or the started one, does not answer.
    """
    if api := api_in_use():
        early_server.end_unused()
        with temporary_settings(api.settings):
            yield api.page
        return
    program, api = _started()
    with _running(program, api), temporary_settings(api.settings):
        yield api.page


def _started() -> tuple[Program, Api]:
    """Return the early server, or start one."""
    if early := early_server.take():
        api = own_api(early.port, early.login)
        access.remember(api)
        return early.program, api
    api = own_api(free_port())
    return start_server(api), api


def deliver() -> None:
    """Send queued log lines and events now: without a server, Prefect would retry for a minute."""
    EventsWorker.drain_all()
    APILogWorker.drain_all()


def start_server(api: Api, log_file: Path | None = None) -> Program:
    """Start the server of `api`, see `own_api`, on this machine's loopback."""
    access.remember(api)
    return Program(
        "Prefect's server",
        [sys.executable, "-m", "prefect", *_arguments(api)],
        environment=_environment(api),
        log=log_file,
        umask=0o077,  # its database may hold secrets
    )


def main() -> None:
    """Run the server that `early_server` has started this process for, unless another is in use.

    Prefect is imported only once, because this process becomes the server.
    """
    [port] = sys.argv[1:]
    if api_in_use():
        return
    api = own_api(int(port), os.environ.pop(early_server.LOGIN))
    os.environ.update(_environment(api))
    refresh_global_settings_context()  # reads the environment again
    _serve(int(port))


def _serve(port: int) -> None:
    """Run a server in this process, as `prefect server start --background` runs one in another.

    The command `prefect` itself is not used, because its own imports would delay the server.
    """
    import uvicorn
    from prefect.server.api.server import create_app

    interpreter.collect_again()
    server = get_current_settings().server
    uvicorn.run(
        create_app(final=True),
        host="127.0.0.1",
        port=port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )


def _arguments(api: Api) -> list[str]:
    """Return the arguments with which Prefect's command runs the server of `api`."""
    return ["server", "start", "--host", "127.0.0.1", "--port", _port(api)]


def _environment(api: Api) -> dict[str, str]:
    return access.protected(api) | {
        "PREFECT_SERVER_API_PORT": _port(api),  # where the UI looks for its server
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def _port(api: Api) -> str:
    return str(urlsplit(api.url).port)


def stop_server(server: Program, api: Api) -> None:
    access.forget(api)
    if not server.stop(STOP_SECONDS):
        log.warning("%s did not stop in %d s: killed", server.name, STOP_SECONDS)


def api_in_use(port: int = USUAL_PORT) -> Api | None:
    """Return the API of the server at PREFECT_API_URL, or of one on this machine, or None.

    Raises:
        RuntimeError: the server at PREFECT_API_URL does not answer, or asks for another login.
        ValueError: PREFECT_API_URL is not the address of an API.
    """
    if url := PREFECT_API_URL.value():
        if not answers(url):
            raise _no_server(url)
        if (api := access.with_login(url)) is None:
            raise RuntimeError(
                f"the server at PREFECT_API_URL {redacted(url)} asks for a login: set it in "
                "PREFECT_API_AUTH_STRING, or unset PREFECT_API_URL to let the run start its own "
                "server"
            )
        return api
    url = local_api(port)
    if not answers(url):
        return None
    if (api := access.with_login(url)) is None:
        log.info("the Prefect server on port %d asks for another login, so it is not used", port)
    return api


def _no_server(url: str) -> Exception:
    """Return the error for a PREFECT_API_URL at which no server answers."""
    name, shown, place = PREFECT_API_URL.name, redacted(url), ""
    unset = "unset the variable"
    profile = get_settings_context().profile
    if name not in os.environ and PREFECT_API_URL in profile.settings:
        place = f" (set in Prefect's profile {profile.name})"
        unset = f"remove it with `prefect config unset {name}`"
    if urlsplit(url).scheme not in ("http", "https"):
        return ValueError(f"{name} {shown}{place} is not an address such as {local_api(4200)}")
    api = f"{url.rstrip('/')}/api"
    if answers(api):
        return ValueError(f"{name} {shown}{place} lacks /api at its end: set it to {redacted(api)}")
    if other := _other_answer(url):
        return ValueError(
            f"{name} {shown}{place} is not the address of a Prefect API ({other}): correct it, or "
            f"{unset} to let the run start its own server"
        )
    return RuntimeError(
        f"no server answers at {name} {shown}{place}: start that server, or {unset} to let the run "
        "start its own server"
    )


def outlives_the_run() -> bool:
    """Return True if the server in use keeps running after the run, so that its buttons work."""
    return PREFECT_API_URL.value() not in _started_here


def own_api(port: int, login: str | None = None) -> Api:
    """Return the API of a server to start on this machine, with its own login.

    Args:
        login: login unless the user has chosen one; a random one by default.
    """
    return Api(local_api(port), access.new_login(login))


def local_api(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def answers(api_url: str) -> bool:
    """Return True if a Prefect API answers, even if it asks for a login.

    The answer is checked, because a proxy or another program may answer with an error or a page.
    """
    try:
        with loopback.open_url(_health(api_url), timeout=5) as answer:
            return bool(answer.headers.get_content_type() == "application/json")
    except urllib.error.HTTPError as error:
        return error.code in access.REFUSED
    except (OSError, ValueError):
        return False


def _other_answer(api_url: str) -> str | None:
    """Return the answer of a program that is not a Prefect API; None if there is no answer."""
    try:
        with loopback.open_url(_health(api_url), timeout=5) as answer:
            return f"a page of type {answer.headers.get_content_type()}"
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except (OSError, ValueError):
        return None


def _health(api_url: str) -> str:
    return f"{without_login(api_url).rstrip('/')}/health"


@contextmanager
def _running(server: Program, api: Api) -> Iterator[None]:
    log.info("starting a Prefect server for this run on port %s", _port(api))
    _started_here.add(api.url)
    try:
        _wait_for(server, api.url)
        log.info("login of the Prefect UI: %s", api.shown_login)
        yield
        _warn_if_ended(server)
    finally:
        _started_here.discard(api.url)
        deliver()
        stop_server(server, api)


def _warn_if_ended(server: Program) -> None:
    try:
        server.require_running()
    except RuntimeError as error:
        log.warning("%s", error)


def _wait_for(server: Program, url: str) -> None:
    try:
        server.wait_until(partial(answers, url), START_SECONDS, poll_seconds=_POLL_SECONDS)
    except RuntimeError as error:
        error.add_note("to use another server, set PREFECT_API_URL")
        raise


if __name__ == "__main__":
    main()
