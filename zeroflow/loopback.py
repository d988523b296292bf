"""Requests to this machine, which must not go through a proxy."""

import os
import urllib.request
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

NAMES = ("127.0.0.1", "localhost", "::1")
"""Names of this machine in addresses."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def bypass_proxies(environment: MutableMapping[str, str] = os.environ) -> None:
    """Exempt this machine from the proxies of this process and its children.

    The clients of Prefect and MLflow use the proxy of http_proxy even for 127.0.0.1, and would send
    it the logins of our servers.
    """
    # Programs read the lower-case variable first, so it must not hide the other one
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    exempt = [name.strip() for name in given.split(",") if name.strip()]
    exempt += [name for name in NAMES if name not in exempt and "*" not in exempt]
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(exempt)


def open_url(request: str | urllib.request.Request, timeout: float) -> Any:
    """Open an address as `urllib.request.urlopen` does, but an address of this machine directly."""
    url = request if isinstance(request, str) else request.full_url
    opener = _DIRECT.open if urlsplit(url).hostname in NAMES else urllib.request.urlopen
    return opener(request, timeout=timeout)
