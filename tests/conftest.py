"""A text and its tokenizer, a Prefect server, and the flow with a cache of its own."""

import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import english
from hypothesis import settings
from pipeline import Flow, free_port, wait_until_healthy
from tiny import Text, jsonl_corpus

from zeroflow.data.tokenizer import TokenizerConfig, fetch_tokenizer

settings.register_profile("any machine", deadline=None)  # timings never decide a test
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Sixty documents, each with a word of its own, and a tokenizer trained on them."""
    folder: Path = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    texts = [f"Marker{number:03}. {english(rng)}" for number in range(60)]
    corpus = jsonl_corpus(folder / "documents.jsonl", texts)
    config = TokenizerConfig(tokenizer_name="train", vocab_size=400)
    return Text(corpus, fetch_tokenizer(config, corpus, folder / "cache"), texts)


@pytest.fixture(scope="session")
def base_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No account, no network, no settings of the person who runs the tests."""
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


@pytest.fixture(scope="session")
def prefect_api(base_environment: dict[str, str]) -> Iterator[str]:
    """Address of a real Prefect server."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        env=base_environment | {"PREFECT_SERVER_API_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_healthy(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def flow(tmp_path: Path, base_environment: dict[str, str], prefect_api: str) -> Flow:
    return Flow(tmp_path / "cache", base_environment | {"PREFECT_API_URL": prefect_api})


@pytest.fixture
def console() -> Iterator[None]:
    """Put the package's logger back as it was."""
    logger = logging.getLogger("zeroflow")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
