import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

from patience import HANG_SECONDS

from zeroflow.data import builders as builders_module
from zeroflow.data.builders import in_threads
from zeroflow.data.part_job import BuiltPart
from zeroflow.data.shards import PartFacts


def part_of_nothing(seconds: float) -> BuiltPart:
    """Told from others by its seconds."""
    facts = PartFacts(
        train={}, validation={}, empty_documents=0, duplicates=0, bad_lines=0, bad_places=()
    )
    return BuiltPart(facts=facts, seconds=seconds)


def test_requested_number_of_threads_build_parts_and_end_with_the_work():
    together, threads = threading.Barrier(3), set()

    def build_part(job):
        threads.add(threading.current_thread())
        together.wait(timeout=HANG_SECONDS)
        return job

    jobs = list(map(part_of_nothing, range(9)))
    with in_threads(3, build_part) as builders:
        endings = [builders.start(job) for job in jobs]
        assert [ending() for ending in endings] == jobs
    assert len(threads) == 3
    for thread in threads:
        thread.join(timeout=HANG_SECONDS)
        assert not thread.is_alive()


def test_new_thread_replaces_one_that_has_built_its_share(monkeypatch):
    """The cache that the tokenizer's library keeps for a thread would grow with the corpus."""
    monkeypatch.setattr(builders_module, "THREAD_PARTS", 2)
    threads, alone = [], threading.Semaphore(1)

    def build_part(job):
        assert alone.acquire(blocking=False), "one at a time"
        threads.append(threading.current_thread())
        alone.release()
        return job

    jobs = list(map(part_of_nothing, range(5)))
    with in_threads(1, build_part) as builders:
        endings = [builders.start(job) for job in jobs]
        assert [ending() for ending in endings] == jobs
    assert [thread is threads[0] for thread in threads] == [True, True, False, False, False]
    assert threads[3] is threads[2] is not threads[4]
    for thread in threads:
        thread.join(timeout=HANG_SECONDS)
        assert not thread.is_alive()


def test_queued_parts_are_not_started_after_one_has_failed():
    """A hub that does not answer holds up each for minutes."""
    begun = []

    def build_part(job):
        begun.append(job)
        if job.seconds == 1:
            raise OSError("the hub is gone")
        return job

    jobs = list(map(part_of_nothing, range(4)))
    with in_threads(1, build_part) as builders:
        first, *others = [builders.start(job) for job in jobs]
        assert first() == jobs[0]
        failures = {ending() for ending in others}
    assert begun == jobs[:2] and str(*failures) == "the hub is gone"


def test_interrupt_does_not_wait_for_parts_that_are_being_built(text, tmp_path):
    """A hub that does not answer may hold up a part for minutes."""
    code = """
import os, signal, threading
from types import SimpleNamespace
from pathlib import Path
from zeroflow.data import builders

def stuck(job):
    if job.path == Path("first"):
        os.kill(os.getpid(), signal.SIGINT)  # to the process, as Ctrl-C is
    threading.Event().wait()

with builders.in_threads(2, stuck) as who:
    for name in ("other", "first"):
        ending = who.start(SimpleNamespace(path=Path(name)))
    ending()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=tmp_path,
    )
    assert done.returncode == -signal.SIGINT, done.stderr


def test_queued_parts_are_not_started_after_they_are_cancelled():
    begun, going_on, given_up = [], threading.Event(), threading.Event()

    def build_part(job):
        begun.append(job)
        going_on.set()
        given_up.wait(timeout=HANG_SECONDS)
        return job

    jobs = list(map(part_of_nothing, range(3)))
    with in_threads(1, build_part) as builders:
        first, *others = [builders.start(job) for job in jobs]
        going_on.wait(timeout=HANG_SECONDS)
        builders.give_up()
        given_up.set()
        assert first() == jobs[0] and begun == jobs[:1]
        assert all(isinstance(ending(), CancelledError) for ending in others)
