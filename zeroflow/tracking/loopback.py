"""Requests to this machine, which bypass proxies."""

import os
import urllib.request
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

NAMES = ("127.0.0.1", "localhost", "::1")
"""Host names and addresses of this machine."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def bypass_proxies(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make this process and its children send requests to this machine without a proxy.

    The clients of Prefect and MLflow use the proxy in http_proxy even for 127.0.0.1. The proxy
    would then receive the logins of our servers.
    """
    # Programs read the lower-case variable first, so both get the same value
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    exempt = [name.strip() for name in given.split(",") if name.strip()]
    exempt += [name for name in NAMES if name not in exempt and "*" not in exempt]
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(exempt)


def open_url(request: str | urllib.request.Request, timeout: float) -> Any:
    """Open an address like `urllib.request.urlopen`, but one of this machine without a proxy."""
    url = request if isinstance(request, str) else request.full_url
    opener = _DIRECT.open if urlsplit(url).hostname in NAMES else urllib.request.urlopen
    return opener(request, timeout=timeout)
