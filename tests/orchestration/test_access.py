"""Requests that a Prefect server started by zeroflow refuses."""

import json
import os
import socket
import urllib.error
import urllib.request
from typing import Any

import psutil
from pipeline import LOGINS, api, headers
from prefect.settings import PREFECT_HOME, temporary_settings

from zeroflow.orchestration import access
from zeroflow.orchestration.server import own_api

PAGE = "http://evil.example"

SHELL = {"prefect.deployments.steps.run_shell_script": {"script": "true"}}


def status(url: str, *, method: str = "POST", body: Any = None, **sent: str) -> int:
    content = json.dumps(body or {}).encode() if method != "OPTIONS" else None
    request = urllib.request.Request(url, content, sent, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_requests_without_login_or_from_other_pages_are_refused(prefect_api):
    flow = api(prefect_api, "/flows/", name="a flow")["id"]
    deployment = {"name": "theirs", "flow_id": flow, "pull_steps": [SHELL]}
    json_type = {"Content-Type": "application/json"}

    def create(**sent: str) -> int:
        return status(f"{prefect_api}/deployments/", body=deployment, **sent)

    assert create(**json_type) in (401, 403), "another user of this machine"
    assert create(**{"Content-Type": "text/plain"}, Origin=PAGE) in (401, 403), "a page"
    assert create(**json_type, Origin=PAGE, Host="evil.example") in (401, 403), "a rebound name"
    known = headers(prefect_api)
    without_token = {name: value for name, value in known.items() if "Csrf" not in name}
    without_login = {name: value for name, value in known.items() if name != "Authorization"}
    assert create(**without_token) == 403
    assert create(**without_login) == 401
    assert api(prefect_api, "/deployments/filter") == []
    assert create(**known) == 201, "with both"


def test_only_its_own_pages_may_send_requests(prefect_api):
    def preflight(origin: str) -> int:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return status(f"{prefect_api}/deployments/", method="OPTIONS", **asked)

    own = prefect_api.removesuffix("/api")
    assert preflight(own) == preflight(own.replace("127.0.0.1", "localhost")) == 200
    assert preflight(PAGE) == preflight("null") == preflight("http://127.0.0.1:1") == 400


def test_login_is_not_in_any_command_line(prefect_api):
    shown = []
    for process in psutil.process_iter():
        try:
            shown += process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    assert any("prefect" in word for word in shown)
    assert not any(LOGINS[prefect_api] in word for word in shown)


def test_login_of_a_killed_server_is_removed_when_another_server_starts(tmp_path):
    with temporary_settings({PREFECT_HOME: tmp_path}), socket.create_server(("127.0.0.1", 0)) as it:
        running, closed = it.getsockname()[1], unused_port()
        old, starting, living = (f"login-{port}" for port in (closed, closed + 1, running))
        (tmp_path / "zeroflow").mkdir()
        for name in (old, starting, living, "notes"):
            (tmp_path / "zeroflow" / name).write_text("zeroflow:secret")
        for name in (old, living, "notes"):
            os.utime(tmp_path / "zeroflow" / name, (0, 0))
        new = own_api(closed + 2)
        access.remember(new)
        left = {file.name for file in (tmp_path / "zeroflow").iterdir()}
    assert left == {starting, living, "notes", f"login-{closed + 2}"}


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
