"""Access to Prefect's servers. Servers that we start require a login, which our processes find.

By default, Prefect lets any page in a browser, and any user of this machine, create a deployment
with a shell step, which a worker would run. Servers that we start require a login that is random
for each start, answer requests of their own pages only, and require a token for each change.
"""

import base64
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
    get_current_settings,
)

from zeroflow import artifacts
from zeroflow.orchestration.early_server import random_login
from zeroflow.text.redaction import without_login
from zeroflow.tracking import loopback

REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
"""HTTP statuses with which a server asks for a login."""


_STARTED_SECONDS = 600
"""Time after which a started server that does not listen is assumed to have been killed."""


def read_settings() -> None:
    """
    Raises:
        ValidationError, TOMLDecodeError: Prefect's settings are wrong.
    """
    get_current_settings()


class Api(NamedTuple):
    """A Prefect API, and the login that its server asks for."""

    url: str
    login: str | None = None
    """None for a server without a login, or if the login is in Prefect's own settings."""

    @property
    def settings(self) -> dict[Any, str]:
        """Prefect's settings for this process."""
        login = {PREFECT_API_AUTH_STRING: self.login} if self.login else {}
        return {PREFECT_API_URL: self.url, **login}

    @property
    def environment(self) -> dict[str, str]:
        """These settings as environment variables; `ps` would show arguments to everyone."""
        return {setting.name: value for setting, value in self.settings.items()}

    @property
    def page(self) -> str:
        """Address of the user interface."""
        return without_login(self.url).removesuffix("/").removesuffix("/api")

    @property
    def shown_login(self) -> str:
        """The login, or its place if our output is not a terminal: others may read the output."""
        if self.login and sys.stdout.isatty():
            return self.login
        file = login_file(self.url)
        return f"in {file if file and file.exists() else PREFECT_API_AUTH_STRING.name}"


def login_file(url: str) -> Path | None:
    """Return the file with the login of a server on this machine, for processes of this user."""
    parts = urlsplit(url)
    if parts.hostname not in loopback.NAMES:
        return None
    return Path(PREFECT_HOME.value()) / "zeroflow" / _login_name(parts.port)


def _login_name(port: object) -> str:
    return f"login-{port}"


def new_login(given: str | None = None) -> str:
    """Return the login of a server that we start: the user's own if it is set.

    Args:
        given: login if the user has not set one; a random one by default.
    """
    chosen: str | None = PREFECT_SERVER_API_AUTH_STRING.value()
    return chosen or given or random_login()


def remember(api: Api) -> None:
    """Write the login of a server that we start, for other processes of this user.

    Raises:
        ValueError: PREFECT_HOME is not writable.
    """
    file = login_file(api.url)
    assert file is not None and api.login is not None, "our servers are on this machine"
    try:
        with artifacts.create_private(file) as output:
            output.write(f"{api.login}\n".encode())
        _forget_killed(file.parent)
    except OSError as error:
        raise ValueError(
            f"cannot write to {file.parent} ({error.strerror}): set PREFECT_HOME to a writable "
            "folder"
        ) from error


def protected(api: Api) -> dict[str, str]:
    """Return the environment of a server for `api`.

    Settings of the user for Prefect's servers take precedence.
    """
    assert api.login is not None, "our servers ask for a login"
    page = urlsplit(api.page)
    origins = (f"{page.scheme}://{host}:{page.port}" for host in ("127.0.0.1", "localhost"))
    ours = {
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(origins),
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_UI_URL": api.page,  # for links in alerts
    }
    users = get_current_settings().to_environment_variables(exclude_unset=True)
    return ours | users | os.environ | {"PREFECT_SERVER_API_AUTH_STRING": api.login}


def forget(api: Api) -> None:
    """Remove the login of a server that has ended."""
    if file := login_file(api.url):
        file.unlink(missing_ok=True)


def _forget_killed(folder: Path) -> None:
    """Remove the logins that killed servers have left."""
    for file in folder.glob(_login_name("*")):
        with suppress(OSError, ValueError):  # another process has just removed it
            is_old = time.time() - file.stat().st_mtime > _STARTED_SECONDS
            if is_old and not _listens(int(file.name.rpartition("-")[2])):
                file.unlink()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def with_login(url: str) -> Api | None:
    """Return the API at `url` with the login that it accepts; None if it accepts no known login."""
    known = [PREFECT_API_AUTH_STRING.value(), None]
    if (file := login_file(url)) and file.exists():
        known.insert(0, file.read_text(encoding="utf-8").strip())
    opened = (login for login in dict.fromkeys(known) if not _refuses(url, login))
    return next((Api(url, login) for login in opened), None)


def _refuses(url: str, login: str | None) -> bool:
    headers, parts = dict(PREFECT_CLIENT_CUSTOM_HEADERS.value()), urlsplit(url)
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    elif key := PREFECT_API_KEY.value():
        headers["Authorization"] = f"Bearer {key}"
    address = f"{without_login(url).rstrip('/')}/admin/version"
    request = urllib.request.Request(address, headers=headers)
    try:
        with loopback.open_url(request, timeout=5):
            return False
    except urllib.error.HTTPError as error:
        return error.code in REFUSED
    except (OSError, ValueError):
        return False  # Prefect's client may still reach it, with its own certificates
