import urllib.request

import httpx
import pytest

from zeroflow.tracking import loopback

PROXY = "http://127.0.0.1:9"


@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
def test_this_machine_is_added_to_the_exempt_names_of_both_spellings(variable):
    environment = {variable: "corp.example, .intern"}
    for _ in range(2):  # again in a child
        loopback.bypass_proxies(environment)
        assert environment["no_proxy"] == "corp.example,.intern,127.0.0.1,localhost,::1"
        assert environment["NO_PROXY"] == environment["no_proxy"]
    environment = {variable: "*"}
    loopback.bypass_proxies(environment)
    assert environment["no_proxy"] == environment["NO_PROXY"] == "*"


def test_prefects_client_reaches_this_machine_directly(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, PROXY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    direct = ("http://127.0.0.1:4200", "http://localhost:4200", "http://[::1]:4200")
    assert not any(_is_direct(url) for url in direct)
    loopback.bypass_proxies()
    assert all(_is_direct(url) for url in direct)
    assert not _is_direct("http://box:4200")
    assert urllib.request.proxy_bypass("127.0.0.1:4200"), "Prefect's websockets use this rule"


def _is_direct(url: str) -> bool:
    with httpx.Client() as client:
        return client._transport_for_url(httpx.URL(url)) is client._transport
