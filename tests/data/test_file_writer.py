import signal
import subprocess
import sys

from patience import HANG_SECONDS
from shard_sets import SMALL


def test_interrupt_does_not_wait_for_a_blocked_disk(text, tmp_path):
    code = """
import os, signal, sys, threading
from pathlib import Path
from zeroflow import artifacts
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import ShardConfig
from zeroflow.data.tokenizer import Tokenizer

def stuck(file, content):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

artifacts.write_recorded = stuck
config, text, tokenizer = sys.argv[1:]
build_shards(
    ShardConfig.model_validate_json(config),
    CorpusConfig.model_validate_json(text),
    Tokenizer.model_validate_json(tokenizer),
    Path(),
)
"""
    settings = [each.model_dump_json() for each in (SMALL, text.corpus, text.tokenizer)]
    done = subprocess.run(
        [sys.executable, "-c", code, *settings],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=tmp_path,
    )
    assert done.returncode == -signal.SIGINT, done.stderr
