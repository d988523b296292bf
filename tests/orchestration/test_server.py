"""The choice of the Prefect server, with servers on loopback that give prepared answers."""

import base64
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from patience import HANG_SECONDS
from pipeline import free_port
from prefect.context import use_profile
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    Profile,
    temporary_settings,
)

from zeroflow import artifacts
from zeroflow.orchestration import access, early_server, server
from zeroflow.orchestration.access import Api
from zeroflow.orchestration.early_server import EarlyServer
from zeroflow.orchestration.programs import Program

Answering = Callable[..., str]


@pytest.fixture(autouse=True)
def home(tmp_path):
    """A home of Prefect's without logins, and settings without one."""
    with temporary_settings({PREFECT_HOME: tmp_path}, restore_defaults={PREFECT_API_AUTH_STRING}):
        yield tmp_path


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Starts a server whose /api/health has the given status; returns the address of its API.

    If it has a login, it asks for that elsewhere.
    """
    started = []

    def start(status: int, login: str | None = None, kind: str = "application/json") -> str:
        expected = f"Basic {base64.b64encode(login.encode()).decode()}" if login else None

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = HTTPStatus.OK if self.path == "/api/admin/version" else HTTPStatus.NOT_FOUND
                if self.path == "/api/health":
                    found = HTTPStatus(status)
                elif expected and self.headers["Authorization"] != expected:
                    found = HTTPStatus.UNAUTHORIZED
                self.send_response(found)
                self.send_header("Content-Type", kind)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        started.append(found)
        return f"http://127.0.0.1:{found.server_port}/api"

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


@contextmanager
def named(url: str | None) -> Iterator[None]:
    """With PREFECT_API_URL set to `url`, or not set."""
    if url:
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    else:
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            yield


@pytest.mark.parametrize(
    ("status", "there"),
    [(200, True), (401, True), (403, True), (502, False), (503, False), (404, False)],
)
def test_server_with_a_login_is_recognised_and_another_program_is_not(answering, status, there):
    url = answering(status)
    assert server.answers(url) == there
    assert server.answers(f"{url}/") == there


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_requests_to_this_machine_avoid_a_proxy(answering, monkeypatch, variable):
    url, proxy = answering(200, "me:s3cret"), answering(502)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, proxy.removesuffix("/api"))
    monkeypatch.setattr("urllib.request._opener", None)  # it has read the variables before
    assert server.answers(url) and not server.answers(server.local_api(free_port()))
    assert access.with_login(url) is None
    with temporary_settings({PREFECT_API_AUTH_STRING: "me:s3cret"}):
        assert access.with_login(url) == Api(url, "me:s3cret")


def test_another_program_is_not_taken_for_a_server(answering):
    page, error = answering(200, kind="text/html"), answering(502)
    for url, found in ((page, "a page of type text/html"), (error, "status 502")):
        assert not server.answers(url)
        with (
            named(url),
            pytest.raises(ValueError, match=rf"{url} is not .*API \({found}\): .*unset"),
        ):
            server.api_in_use()


def test_nothing_answers_on_a_free_port_or_at_no_address():
    assert not server.answers(server.local_api(free_port()))
    assert not server.answers("no address")


def test_address_without_api_is_refused_with_the_right_one(answering):
    url = answering(200)
    for given in (url.removesuffix("/api"), url.removesuffix("api")):
        with (
            named(given),
            pytest.raises(ValueError, match=rf"lacks /api at its end: set it to {url}$"),
        ):
            server.api_in_use()
    for given in ("127.0.0.1:4200/api", "no address"):
        with named(given), pytest.raises(ValueError, match=rf"{given} is not an address such as"):
            server.api_in_use()


def test_profile_that_names_a_server_is_reported_with_the_remedy():
    gone = server.local_api(free_port())
    mine = Profile(name="mine", settings={PREFECT_API_URL: gone})
    with (
        use_profile(mine, override_environment_variables=True),
        pytest.raises(RuntimeError, match=r"profile mine.*prefect config unset PREFECT_API_URL"),
    ):
        server.api_in_use()


def test_named_server_takes_precedence_over_one_on_this_machine(answering):
    local, elsewhere = answering(200), answering(200)
    port = int(local.split(":")[2].split("/")[0])
    with named(None):
        assert server.api_in_use(port) == Api(local) == Api(server.local_api(port))
        assert server.api_in_use(free_port()) is None
    with named(elsewhere):
        assert server.api_in_use(port) == Api(elsewhere)


def test_named_server_that_does_not_answer_is_an_error_although_another_exists(answering):
    local = answering(200)
    port = int(local.split(":")[2].split("/")[0])
    gone = server.local_api(free_port())
    with named(gone), pytest.raises(RuntimeError, match=f"no server answers at .*{gone}.*unset"):
        server.api_in_use(port)


def test_block_uses_the_named_server_and_starts_none(answering, monkeypatch):
    def start(*_: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(server, "start_server", start)
    url = answering(200)
    with named(url), server.server() as address:
        assert address == url.removesuffix("/api")
        assert PREFECT_API_URL.value() == url


def test_block_starts_a_server_of_its_own_if_there_is_none_and_stops_it(answering, monkeypatch):
    """The tests of flows use a real server that was started in this way."""
    url = answering(200)
    program = Program("a program", ["sleep", "600"], environment=os.environ)
    monkeypatch.setattr(server, "api_in_use", lambda: None)
    monkeypatch.setattr(server, "own_api", lambda port: Api(url, "me:s3cret"))
    monkeypatch.setattr(server, "start_server", lambda api: program)
    with named(None):
        with server.server() as address:
            assert address == url.removesuffix("/api")
            assert (PREFECT_API_URL.value(), server.outlives_the_run()) == (url, False)
            program.require_running()
        assert PREFECT_API_URL.value() is None
    with pytest.raises(RuntimeError, match="has ended"):
        program.require_running()


def early(*command: str) -> EarlyServer:
    program = Program("a program", command, environment=os.environ)
    return EarlyServer(program, free_port(), "me:random")


def test_early_server_is_taken_if_it_runs(home, monkeypatch):
    running = early("sleep", "600")
    monkeypatch.setattr(early_server, "_started", [running])
    program, api = server._started()
    assert (program, api.login) == (running.program, "me:random")
    assert (home / "zeroflow" / f"login-{running.port}").exists(), "for other processes"
    program.stop(0)
    assert early_server.take() is None


def test_another_server_is_started_if_the_early_one_has_ended(monkeypatch):
    ended = early("true")
    ended.program.wait_for_end(HANG_SECONDS)
    monkeypatch.setattr(early_server, "_started", [ended])
    monkeypatch.setattr(server, "start_server", lambda api: "another")
    program, api = server._started()
    assert program == "another" and api.login != "me:random"


def test_early_server_is_ended_if_another_server_is_in_use(answering, monkeypatch):
    running = early("sleep", "600")
    monkeypatch.setattr(early_server, "_started", [running])
    with named(answering(200)), server.server():
        assert not running.program.running


def test_early_server_finds_out_that_another_server_is_in_use(answering, base_environment):
    variables = {"PREFECT_API_URL": answering(200), early_server.LOGIN: "me:random"}
    command = [sys.executable, "-m", "zeroflow.orchestration.server", str(free_port())]
    ended = subprocess.run(
        command, env=base_environment | variables, capture_output=True, timeout=HANG_SECONDS
    )
    assert (ended.returncode, ended.stdout) == (0, b"")


def test_no_server_is_started_early_if_one_is_named_or_listens(answering, monkeypatch):
    monkeypatch.setattr(early_server, "_started", [])
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    early_server.start()
    monkeypatch.delenv("PREFECT_API_URL")
    port = urlsplit(answering(200)).port
    monkeypatch.setattr(early_server, "USUAL_PORT", port)
    early_server.start()
    assert early_server.take() is None


@pytest.mark.parametrize("url", ["http://host:4200/api", "http://host:4200/api/"])
def test_user_interface_is_next_to_the_api(url):
    assert Api(url).page == "http://host:4200"


def test_login_comes_from_the_file_of_the_server_or_from_prefects_settings(answering, home):
    url = answering(200, "me:s3cret")
    port = int(url.split(":")[2].split("/")[0])
    with named(None):
        assert server.api_in_use(port) is None, "it is somebody else's"
        with temporary_settings({PREFECT_API_AUTH_STRING: "me:s3cret"}):
            assert server.api_in_use(port) == Api(url, "me:s3cret")
        file = home / "zeroflow" / f"login-{port}"
        with artifacts.create_private(file) as output:
            output.write(b"me:s3cret\n")
        assert server.api_in_use(port) == Api(url, "me:s3cret")
        with temporary_settings({PREFECT_API_AUTH_STRING: "me:another"}):
            assert server.api_in_use(port) == Api(url, "me:s3cret")
    with named(url):
        assert server.api_in_use() == Api(url, "me:s3cret")
        file.write_text("of a server that was killed")
        with pytest.raises(
            RuntimeError, match=f"server at .*{url} asks for a login: .*AUTH_STRING"
        ):
            server.api_in_use()


def test_password_in_the_address_of_a_server_is_used_and_not_shown(answering):
    url = answering(200, "me:s3cret").replace("http://", "http://me:s3cret@")
    with named(url):
        api = server.api_in_use()
        assert api is not None and api.url == url and "s3cret" not in api.page
    gone = f"http://me:s3cret@127.0.0.1:{free_port()}/api"
    with named(gone), pytest.raises(RuntimeError) as error:
        server.api_in_use()
    assert "s3cret" not in str(error.value) and "***@127.0.0.1" in str(error.value)


def test_login_is_new_for_every_start_and_only_this_user_can_read_it(home, monkeypatch):
    first, second = (server.own_api(4321) for _ in range(2))
    assert first.login != second.login and len(str(first.login)) > 30
    environment = access.protected(first)
    assert environment["PREFECT_SERVER_API_AUTH_STRING"] == first.login
    access.remember(first)
    assert environment["PREFECT_UI_URL"] == "http://127.0.0.1:4321", "for links in alerts"
    [file] = (home / "zeroflow").iterdir()
    assert file.read_text().strip() == first.login and file.stat().st_mode & 0o077 == 0
    assert first.shown_login == f"in {file}", "as this is no terminal"
    access.forget(first)
    assert not file.exists()

    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "https://mine.example")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:chosen")
    with temporary_settings():  # reads the environment again
        assert server.own_api(4321, "zeroflow:random").login == "me:chosen"
        environment = access.protected(server.own_api(4321))
    assert environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "https://mine.example"
    assert environment["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] == "https://mine.example"


def test_unwritable_home_is_named(home):
    (home / "zeroflow").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write to .*: set PREFECT_HOME"):
        access.remember(server.own_api(4321))
