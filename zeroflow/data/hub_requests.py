"""Requests to the Hugging Face Hub: timeouts, retries, and partial answers."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from zeroflow.data.hub_errors import HubError, explain_silence, from_status
from zeroflow.data.time_limit import within
from zeroflow.text.redaction import host
from zeroflow.units import count

log = logging.getLogger(__name__)

T = TypeVar("T")

_WORTH_A_LINE_SECONDS = 1.0
"""Waits of at least this duration are logged."""


@dataclass(frozen=True)
class Patience:
    """Limits on the time and the tries of a request."""

    seconds: float
    """Time within which tries may start. A request for n bytes ends within
    `seconds + 2 * stall_seconds + window_seconds + n / slow_bytes_per_second`."""

    tries: int
    """Maximum number of consecutive tries without progress."""

    stall_seconds: float
    """Seconds to wait for an answer, and for each further byte of it."""

    slow_bytes_per_second: float = 32 * 1024
    """Minimum speed. A slower answer is cancelled, and the rest of it is requested again."""

    window_seconds: float = 10.0
    """Seconds that an answer may be slow before it is cancelled."""

    first_wait_seconds: float = 0.5
    """Wait between the first and the second try, reduced by up to a random half. It doubles with
    every try."""

    longest_wait_seconds: float = 15.0
    """Maximum wait. A Retry-After of the hub takes precedence; if it is longer than the rest of
    `seconds`, the request fails immediately."""


ANSWER_SECONDS = 5.0
"""Seconds that the hub may take to answer a question about a repository."""

QUESTION = Patience(ANSWER_SECONDS, tries=3, stall_seconds=ANSWER_SECONDS, first_wait_seconds=0.25)
"""For requests that decide whether a run uses the hub. It is short, because the user is waiting."""

READING = Patience(120.0, tries=20, stall_seconds=20.0)
"""For requests that a run depends on. It is long enough for a restart of the hub or of a router."""


class Effort:
    """The tries and the time that a request has used so far.

    Received bytes extend the time, so that a large read survives many short interruptions.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.kept = 0
        """Received bytes, which need not be requested again."""
        self.tries = 0
        self._without_progress = 0
        self._kept_before = 0
        self._started = time.monotonic()

    def __str__(self) -> str:
        tries = count(self.tries, "try", "tries")
        return f"{tries} in {time.monotonic() - self._started:.1f} s"

    def left(self) -> float:
        earned = self.kept / self.patience.slow_bytes_per_second
        return self._started + self.patience.seconds + earned - time.monotonic()

    def wait_after(self, failure: HubError) -> float | None:
        """Seconds before the next try; None if there is none."""
        self._without_progress = 1 if self.kept > self._kept_before else self._without_progress + 1
        self._kept_before = self.kept
        if not failure.transient or self._without_progress >= self.patience.tries:
            return None
        wait = failure.retry_after
        if wait is None:
            doubled = self.patience.first_wait_seconds * 2 ** (self._without_progress - 1)
            # Not Python's shared generator: training seeds it and depends on its sequence
            share = random.SystemRandom().uniform(0.5, 1)
            wait = share * min(doubled, self.patience.longest_wait_seconds)
        return wait if wait < self.left() else None


def persist(subject: str, patience: Patience, attempt: Callable[[Effort], T]) -> T:
    """Call `attempt` again after transient failures, until it succeeds or `patience` is used up.

    Raises:
        HubError: the last failure, with the number of tries.
    """
    effort = Effort(patience)
    while True:
        effort.tries += 1
        try:
            return attempt(effort)
        except HubError as failure:
            wait = effort.wait_after(failure)
            if wait is None:
                raise HubError(
                    subject,
                    f"{failure.cause} ({effort})",
                    transient=failure.transient,
                    retry_after=failure.retry_after,
                ) from failure.__cause__
            if wait >= _WORTH_A_LINE_SECONDS:
                log.warning("%s: %s; next try in %.1f s", subject, failure.cause, wait)
        time.sleep(wait)


@contextmanager
def answer(
    url: str, subject: str, effort: Effort, *, missing_is_fine: bool = False, **headers: str
) -> Iterator[Any]:
    """The hub's answer with status 2xx, before its body is read.

    The library's client applies the user's proxies and certificates, and sends the token only to
    the first host.

    Raises:
        HubError: no answer came in time, or its status is not 2xx.
    """
    from huggingface_hub import constants, get_session, get_token

    limit = effort.patience.stall_seconds
    headers |= {"User-Agent": "zeroflow", "Accept-Encoding": "identity"}
    # `build_hf_headers` is not used: it first requests a list from the hub, with its own timeouts
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        if not (token.isascii() and token.isprintable()):  # the client's error would contain it
            raise HubError(subject, "the token is malformed: see HF_TOKEN", transient=False)
        headers["Authorization"] = f"Bearer {token}"

    def send() -> Any:
        client = get_session()
        request = client.build_request("GET", url, headers=headers, timeout=limit)
        return client.send(request, stream=True, follow_redirects=True)

    try:
        # The client's own timeout covers neither name resolution nor headers that come byte by byte
        response = within(limit, send, late=lambda response: response.close())
    except Exception as error:
        raise explain_silence(error, subject, url, limit) from error
    try:
        missing = response.headers.get("X-Error-Code") == "EntryNotFound"
        if not (response.is_success or (missing and missing_is_fine)):
            here, there = host(url), host(str(response.url))
            storage = there if there != here else ""
            raise from_status(int(response.status_code), response.headers, subject, storage)
        yield response
    finally:
        response.close()


def body(response: Any, subject: str, effort: Effort) -> Iterator[bytes]:
    """The pieces of an answer's body in the order in which they arrive.

    Raises:
        HubError: the answer ended early, or is slower than the patience allows.
    """
    patience = effort.patience
    began, heard = time.monotonic(), 0
    pieces = response.iter_bytes()
    while True:
        try:
            piece = next(pieces, None)
        except Exception as error:
            url = str(response.url)
            raise explain_silence(error, subject, url, patience.stall_seconds) from error
        if piece is None:
            return
        heard += len(piece)
        yield piece
        passed = time.monotonic() - began
        if passed >= patience.window_seconds:
            if heard < patience.slow_bytes_per_second * passed:
                cause = f"the answer is too slow ({heard / passed:,.0f} bytes/s)"
                raise HubError(subject, cause, transient=True)
            began, heard = time.monotonic(), 0
