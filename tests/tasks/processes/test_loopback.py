"""Loopback is excepted from proxies; what the user excepted stays."""

from __future__ import annotations

import os
import urllib.request

import httpx
import pytest

from tasks.processes.loopback import keep_loopback_from_proxies


@pytest.mark.parametrize("given", [{}, {"no_proxy": "intra.example"}, {"NO_PROXY": "intra.example,localhost"}])
def test_loopback_is_reached_without_the_proxy_and_other_hosts_by_it(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9", **given}.items():
        monkeypatch.setenv(name, value)
    keep_loopback_from_proxies()
    keep_loopback_from_proxies()  # again changes nothing
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    assert os.environ["no_proxy"].count("localhost") == 1
    for host in ("localhost", "127.0.0.1"):
        assert urllib.request.proxy_bypass_environment(host)  # requests asks the same function
    assert bool(urllib.request.proxy_bypass_environment("intra.example")) == bool(given)
    with httpx.Client() as client:
        proxied = {pattern.pattern for pattern, transport in client._mounts.items() if transport is not None}
    assert proxied and not any("127.0.0.1" in pattern for pattern in proxied)
