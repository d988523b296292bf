"""Which Prefect server is used, beside servers on loopback that answer as they are told."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pipeline import free_port
from prefect.settings import PREFECT_API_URL, temporary_settings

from zeroflow.orchestration import server

Answering = Callable[[int], str]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Starts a server whose /api/health has the given status; returns the address of its API."""
    started = []

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == "/api/health" else HTTPStatus.NOT_FOUND)
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
    [(200, True), (401, True), (403, True), (503, True), (404, False)],
)
def test_server_that_wants_a_login_is_one_and_another_program_is_none(answering, status, there):
    url = answering(status)
    assert server.answers(url) == there
    assert server.answers(f"{url}/") == there


def test_nothing_answers_on_a_free_port_or_at_no_address():
    assert not server.answers(server.local_api(free_port()))
    assert not server.answers("no address")


def test_server_that_is_named_comes_before_one_on_this_machine(answering):
    local, elsewhere = answering(200), answering(200)
    port = int(local.split(":")[2].split("/")[0])
    with named(None):
        assert server.api_in_use(port) == local == server.local_api(port)
        assert server.api_in_use(free_port()) is None
    with named(elsewhere):
        assert server.api_in_use(port) == elsewhere


def test_server_that_is_named_and_does_not_answer_is_an_error_although_another_is_there(answering):
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


@pytest.mark.parametrize("api", ["http://host:4200/api", "http://host:4200/api/"])
def test_user_interface_lies_beside_the_api(api):
    assert server.ui_address(api) == "http://host:4200"
