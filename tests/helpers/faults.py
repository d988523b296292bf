"""Faults between a reader and the hub, and the expected outcomes.

The test and the table of `benchmarks/hub_faults.py` share the list.
"""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.message import Message
from email.utils import formatdate
from threading import Thread
from typing import NamedTuple
from urllib.request import getproxies

import pytest
from hub import Fault, Hub, Repo
from huggingface_hub import close_session, constants

from zeroflow.data import hub as hubs
from zeroflow.data.hub import HubError, HubFile, Patience

DATASET = "owner/data"
FILE = "train/000.bin"
CONTENT = random.Random(0).randbytes(300_000)
REPO = Repo("dataset", DATASET, {FILE: CONTENT})

BEFORE = slice(1_000, 2_000)
"""Range that is read before the fault begins."""

READ = slice(100_000, 200_000)

NOBODY = "http://127.0.0.1:9"
"""The discard port, where no server listens."""


FOR_EVER = 10.0**9

CALM = Patience(120.0, tries=3, stall_seconds=600.0, window_seconds=600.0)
"""For answers that come at once, however slow this machine is."""


class VirtualTime:
    """Replaces `time` where requests wait: a wait takes no time, and moves the clock on."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Trouble(NamedTuple):
    name: str

    faults: tuple[Fault | None, ...] = (None,)
    """Faults of consecutive requests; the last one applies to all that follow."""

    says: str = ""
    """Part of the failure's message; empty if the read succeeds."""

    transient: bool = True

    endpoint: str = ""
    """Address that replaces the hub's after the first read."""

    away_seconds: float = 0.0
    """Seconds for which the hub is stopped after the first read; it returns at the same port."""

    @property
    def stalls(self) -> bool:
        return any(fault and fault.stall_after_bytes is not None for fault in self.faults)

    @property
    def trickles(self) -> bool:
        return any(fault and fault.bytes_per_second for fault in self.faults)

    @property
    def is_about_time(self) -> bool:
        """True if the reader has to measure time: the hub is silent or slow, or comes back."""
        return self.stalls or self.trickles or 0 < self.away_seconds < FOR_EVER

    @property
    def patience(self) -> Patience:
        """Its outcome does not depend on the speed of this machine.

        It is short only where the hub is silent or slow for longer. A read that succeeds may be
        tried as often as a busy machine needs.
        """
        if not self.is_about_time:
            return CALM
        return Patience(
            seconds=0.3 if self.says else FOR_EVER,
            tries=20 if self.says else 10**9,
            stall_seconds=0.25 if self.stalls else 600.0,
            slow_bytes_per_second=100_000,
            window_seconds=0.2 if self.trickles else 600.0,
            first_wait_seconds=0.05,
            longest_wait_seconds=0.2,
        )


class Outcome(NamedTuple):
    data: bytes | None
    error: HubError | None
    seconds: float
    requests: int


def answers(status: int, **headers: str) -> Fault:
    return Fault(status, {name.replace("_", "-"): value for name, value in headers.items()})


TROUBLES = [
    Trouble("none"),
    Trouble("401 gated", (answers(401, X_Error_Code="GatedRepo"),), "gated", False),
    Trouble(
        "401 unknown", (answers(401),), "does not exist on the hub, or is private (401)", False
    ),
    Trouble("403", (answers(403),), "gated", False),
    Trouble("404", (answers(404, X_Error_Code="EntryNotFound"),), "(EntryNotFound)", False),
    Trouble("416", (answers(416, Content_Range="bytes */9"),), "has changed since", False),
    Trouble("408 once", (answers(408), None)),
    Trouble("429 once, no Retry-After", (answers(429), None)),
    Trouble("429 once, Retry-After: 1", (answers(429, Retry_After="1"), None)),
    Trouble("429, Retry-After: 3600", (answers(429, Retry_After="3600"),), "to wait 3600 s"),
    Trouble("429, rate limit in 300 s", (answers(429, RateLimit='"api";r=0;t=300'),), "wait 300 s"),
    Trouble("429 always", (answers(429),), "slow down (429)"),
    Trouble("500 once", (answers(500), None)),
    Trouble("500 always", (answers(500),), "answers 500"),
    Trouble("503 once", (answers(503), None)),
    Trouble(
        "503, Retry-After: a date in a day",
        (answers(503, Retry_After=formatdate(time.time() + 86_400, usegmt=True)),),
        "answers 503 and asks to wait ",
    ),
    Trouble("503 always", (answers(503),), "answers 503"),
    Trouble("504 always", (answers(504),), "answers 504"),
    Trouble("dropped half-way once", (Fault(drop_after_bytes=50_000), None)),
    Trouble("dropped at every 30 kB", (Fault(drop_after_bytes=30_000),)),
    Trouble("dropped at once, always", (Fault(drop_after_bytes=0),), "was lost"),
    Trouble("truncated body once", (Fault(truncate_to_bytes=50_000), None)),
    Trouble("empty body always", (Fault(truncate_to_bytes=0),), "ended after 0 of 100,000"),
    Trouble("stall once", (Fault(stall_after_bytes=50_000), None)),
    Trouble("stall always", (Fault(stall_after_bytes=0),), "no "),
    Trouble("trickle once", (Fault(bytes_per_second=2_000), None)),
    Trouble("trickle always", (Fault(bytes_per_second=2_000),), "is too slow"),
    Trouble("refused", says="refuses connections", endpoint=NOBODY),
    Trouble("name not resolved", says="cannot be reached", endpoint="http://hub.invalid"),
    Trouble("gone for 0.5 s", away_seconds=0.5),
    Trouble("gone for good", away_seconds=FOR_EVER, says="refuses connections"),
    Trouble(
        "file changes between two reads",
        (Fault(headers={"X-Linked-Etag": '"other"'}),),
        "has changed since it was opened (ETag other",
        False,
    ),
    Trouble(
        "file has another size",
        (Fault(headers={"Content-Range": "bytes 100000-199999/300001"}),),
        "has changed since it was listed (300,001",
        False,
    ),
    Trouble(
        "other bytes than requested",
        (Fault(headers={"Content-Range": "bytes 0-99999/300000"}),),
        "the answer contains other bytes than requested",
    ),
    Trouble("range ignored: 200", (Fault(ignore_range=True),)),
]


def hurried(seconds: float) -> Patience:
    """Return a version of READING with shorter times, for a benchmark that does not take hours."""
    return Patience(
        seconds,
        tries=20,
        stall_seconds=0.25,
        slow_bytes_per_second=100_000,
        window_seconds=0.2,
        first_wait_seconds=0.05,
        longest_wait_seconds=0.2,
    )


def longest(patience: Patience, n_bytes: int) -> float:
    """Return the maximum seconds of a request for `n_bytes`, as documented in `Patience`."""
    last = 2 * patience.stall_seconds + patience.window_seconds
    return patience.seconds + last + n_bytes / patience.slow_bytes_per_second


@contextmanager
def asking(url: str) -> Iterator[pytest.MonkeyPatch]:
    """Use the hub at `url` instead of the one in HF_ENDPOINT at import, without proxy and token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
        patch.setenv("NO_PROXY", "*")
        patch.delenv("HF_TOKEN", raising=False)
        if getproxies():
            close_session()  # an open session may have a proxy
        yield patch


def one_after_the_other(faults: tuple[Fault | None, ...]) -> Iterator[Fault | None]:
    yield from faults
    while True:
        yield faults[-1]


def meet(trouble: Trouble, patience: Patience | None = None) -> Outcome:
    """Read the range `READ` of `FILE` under the faults of `trouble`."""
    patience = patience or trouble.patience
    with ExitStack() as stack:
        hub = stack.enter_context(Hub([REPO]))
        stack.enter_context(asking(trouble.endpoint or hub.url))
        file = stack.enter_context(
            hubs.open_file(DATASET, HubFile(FILE, len(CONTENT)), revision=REPO.sha, patience=CALM)
        )
        if not trouble.endpoint:
            file.seek(BEFORE.start)
            assert file.read(BEFORE.stop - BEFORE.start) == CONTENT[BEFORE]
        file._patience = patience
        if trouble.away_seconds:
            leave(hub, trouble.away_seconds, stack)

        faults = one_after_the_other(trouble.faults)

        def fault(method: str, path: str, headers: Message) -> Fault | None:
            return next(faults)

        before, hub.fault = len(hub.requests), fault
        started = time.monotonic()
        data = error = None
        try:
            file.seek(READ.start)
            data = file.read(READ.stop - READ.start)
        except HubError as failure:
            error = failure
        return Outcome(data, error, time.monotonic() - started, len(hub.requests) - before)


def leave(hub: Hub, seconds: float, stack: ExitStack) -> None:
    """Stop a hub, and start another at its port after `seconds`."""
    port = int(hub.url.rpartition(":")[2])
    hub.__exit__()
    if seconds == FOR_EVER:
        return

    def come_back() -> None:
        time.sleep(seconds)
        stack.enter_context(Hub([REPO], port))

    Thread(target=come_back, daemon=True).start()
