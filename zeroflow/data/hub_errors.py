"""Failures of the Hugging Face Hub, each explained in one sentence."""

import email.utils
import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Self

from zeroflow.text import redaction
from zeroflow.text.redaction import redacted


class HubError(RuntimeError):
    """The hub refused a request, or could not be reached."""

    def __init__(
        self,
        subject: str,
        cause: str,
        *,
        transient: bool,
        remedies: tuple[str, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        cause = redacted(cause)
        self.subject, self.cause, self.transient = subject, cause, transient
        """`transient`: True if the same call may succeed later."""
        self.remedies = remedies
        self.retry_after = retry_after
        """Seconds to wait before the next request, if the hub asked for that."""
        ways = "".join(f"\n  - {remedy}" for remedy in remedies)
        super().__init__(f"{subject}: {cause}" + (f". What can be done:{ways}" if ways else ""))

    def __reduce__(self) -> Any:
        """Support pickle, such as from a Dask worker, which passes positional arguments only."""
        return partial(
            type(self),
            transient=self.transient,
            remedies=self.remedies,
            retry_after=self.retry_after,
        ), (self.subject, self.cause)

    def with_remedies(self, *remedies: str) -> Self:
        return type(self)(
            self.subject,
            self.cause,
            transient=self.transient,
            remedies=remedies,
            retry_after=self.retry_after,
        )


def explain(error: BaseException, subject: str) -> HubError:
    """Explain an exception of the hub's libraries by its status and cause.

    Its class is ignored: the classes change between versions, and some report a 503 as
    FileNotFoundError.
    """
    for cause in _chain(error):
        response: Any = getattr(cause, "response", None)
        if hasattr(response, "status_code"):
            return from_status(int(response.status_code), response.headers, subject)
    for cause in _chain(error):
        if isinstance(cause, OSError | TimeoutError) or "timeout" in type(cause).__name__.lower():
            return HubError(subject, f"the hub cannot be reached ({cause})", transient=True)
    text = " ".join(str(error).split())[:300]
    unreachable = any("connect" in type(c).__name__.lower() for c in _chain(error))
    cause_text = "the hub cannot be reached" if unreachable else "reading from the hub failed"
    return HubError(subject, f"{cause_text} ({type(error).__name__}: {text})", transient=True)


def explain_silence(error: BaseException, subject: str, url: str, limit: float) -> HubError:
    """Explain why no answer came, or why the answer ended early.

    Args:
        limit: seconds without a byte after which the request was cancelled.
    """
    chain = list(_chain(error))
    host = redaction.host(_asked_last(chain) or url)
    names = " ".join(type(cause).__name__ for cause in chain)

    def found(*classes: type[BaseException]) -> bool:
        return any(isinstance(cause, classes) for cause in chain)

    if "Offline" in names:
        return HubError(
            subject, "HF_HUB_OFFLINE is set, which forbids all requests to the hub", transient=False
        )
    if "UnsupportedProtocol" in names or "InvalidURL" in names:
        return HubError(
            subject, f"{url} is not a valid address ({error}): see HF_ENDPOINT", transient=False
        )
    if found(ssl.SSLCertVerificationError):
        return HubError(subject, f"the certificate of {host} is not trusted", transient=False)
    if found(socket.gaierror):
        cause = f"the hub cannot be reached (the name {host} could not be resolved)"
    elif found(ConnectionRefusedError):
        cause = f"the hub cannot be reached ({host} refuses connections)"
    elif isinstance(error, TimeoutError):  # from `within`, without the address
        cause = f"no answer came within {limit:.1f} s"
    elif found(TimeoutError) or "Timeout" in names:
        cause = f"no data arrived from {host} for {limit:.1f} s"
    elif found(ConnectionError) or "Protocol" in names or "ReadError" in names:
        cause = f"the connection to {host} was lost"
    else:
        return explain(error, subject)
    return HubError(subject, cause, transient=True)


def _asked_last(chain: list[BaseException]) -> str:
    """Return the address of the failed request, which may be one that the hub redirected to."""
    for cause in chain:
        with suppress(AttributeError, RuntimeError):  # no such attribute, or never set
            return str(cause.request.url)  # type: ignore[attr-defined]
    return ""


def from_status(status: int, headers: Any, subject: str, storage: str = "") -> HubError:
    """Explain an HTTP status.

    Args:
        storage: the host that answered, if it is not the hub.
    """
    code, said = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    if storage and status in (401, 403, 404):
        cause = f"{storage}, where the hub keeps its files, answers {status}"
        return HubError(subject, cause, transient=False)
    if code == "GatedRepo" or status == 403:
        cause = f"gated: the hub requires an accepted licence and a login ({status})"
        return HubError(subject, cause, transient=False)
    if status == 401 and "credentials" in said:
        return HubError(subject, "the hub does not accept the token (401)", transient=False)
    if status == 401:
        return HubError(subject, "does not exist on the hub, or is private (401)", transient=False)
    if status == 404:
        return HubError(subject, f"not found on the hub ({code or 404})", transient=False)
    if status == 416:
        cause = f"the file has changed since it was listed (416, {headers.get('Content-Range')})"
        return HubError(subject, cause, transient=False)
    wait = _asked_wait(status, headers)
    cause = f"{storage or 'the hub'} answers {status}"
    if status == 429:
        cause = f"{storage or 'the hub'} asks to slow down (429)"
    if wait is not None:
        cause += f" and asks to wait {wait:.0f} s"
    transient = status in (408, 429) or status >= 500
    return HubError(subject, cause, transient=transient, retry_after=wait)


def _asked_wait(status: int, headers: Any) -> float | None:
    """Seconds to wait before the next try, if the answer contains them."""
    if status not in (429, 503):
        return None
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    if asked:
        try:
            until = email.utils.parsedate_to_datetime(asked)
        except ValueError:
            return None
        return max(until.timestamp() - time.time(), 0.0)
    # Source: draft-ietf-httpapi-ratelimit-headers, as the hub uses it: "api";r=0;t=55
    limited = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(limited[1]) if limited else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
