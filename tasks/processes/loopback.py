"""This machine's own servers are reached without a proxy, whatever the environment says about others."""

from __future__ import annotations

import os

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def keep_loopback_from_proxies() -> None:
    """Except this machine's own addresses from every proxy that the environment names; other hosts keep theirs.

    Both spellings are written: libraries differ in which of the two wins.
    """
    spellings = ("no_proxy", "NO_PROXY")
    given = [host.strip() for name in spellings for host in os.environ.get(name, "").split(",") if host.strip()]
    excepted = ",".join(dict.fromkeys([*given, *_LOOPBACK]))
    for name in spellings:
        os.environ[name] = excepted
