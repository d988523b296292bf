"""A text and its tokenizer, a Prefect server, and the flow with a cache of its own.

The process that distributes the tests also imports this file, before it starts those that run them.
Fixtures therefore import what takes seconds.
"""

import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from hypothesis import settings
from patience import HANG_SECONDS

if TYPE_CHECKING:
    from pipeline import Flow
    from tiny import Text

# A shell without job control starts background commands with SIGINT ignored, which children inherit
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("any machine", deadline=None)  # timings never decide a test
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import tiny  # noqa: F401, sets it


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Measure the CPU for less than 0.2 s, because many tests make a plan."""
    from zeroflow.estimate import speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "CPU_MEASUREMENT_SECONDS", 0.02)
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> "Text":
    """Sixty documents, each with a word of its own, and a tokenizer trained on them."""
    from hub import english
    from tiny import Text, jsonl_corpus

    from zeroflow.data.tokenizer import TokenizerConfig
    from zeroflow.data.tokenizer_origins import fetch_tokenizer

    folder: Path = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    texts = [f"Marker{number:03}. {english(rng)}" for number in range(60)]
    corpus = jsonl_corpus(folder / "documents.jsonl", texts)
    config = TokenizerConfig(tokenizer_name="train", vocab_size=400)
    return Text(corpus, fetch_tokenizer(config, corpus, folder / "cache"), texts)


@pytest.fixture(scope="session")
def base_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No account, no network, no settings of the person who runs the tests."""
    from pipeline import free_port

    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "HF_"))}
    return kept | {
        "HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "OMP_NUM_THREADS": "1",  # such small matrices only wait for a second thread
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",  # where nobody answers
    }


SERVER = """
import sys
from zeroflow.orchestration import server
port = int(sys.argv[1])
api = server.own_api(port)
with server._running(server.start_server(api), api):
    print(api.login, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def prefect_api(base_environment: dict[str, str]) -> Iterator[str]:
    """Address of a real Prefect server, started as by a run.

    This process has its login as a setting of Prefect, and the flows that tests start find it in
    the home that they share with the server.
    """
    from pipeline import LOGINS, free_port
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        env=base_environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    login = server.stdout.readline().strip()
    assert login, "the Prefect server ended"
    url = f"http://127.0.0.1:{port}/api"
    LOGINS[url] = login
    with temporary_settings({PREFECT_API_AUTH_STRING: login}):
        yield url
    programs = psutil.Process(server.pid).children(recursive=True)
    server.communicate(timeout=HANG_SECONDS)
    _, left = psutil.wait_procs(programs, timeout=HANG_SECONDS)
    assert programs and not left, "the server of a run is stopped at its end"


@pytest.fixture
def flow(tmp_path: Path, base_environment: dict[str, str], prefect_api: str) -> "Flow":
    from pipeline import Flow

    return Flow(tmp_path / "cache", base_environment | {"PREFECT_API_URL": prefect_api})


@pytest.fixture
def console() -> Iterator[None]:
    """Put the package's logger back as it was."""
    logger = logging.getLogger("zeroflow")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
