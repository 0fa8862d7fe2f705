"""The server's page for people: what is served, its traffic, and a prompt to try it with."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

_FILE = Path(__file__).with_name("page.html")


def page() -> HTMLResponse:
    """The page. It may run its own script and style alone, and talk to this server alone."""
    text, policy = _read()
    return HTMLResponse(text, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})


@cache
def _read() -> tuple[str, str]:
    text = _FILE.read_text()
    sources = {}
    for kind in ("script", "style"):
        content = re.search(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert content is not None
        sources[kind] = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
    policy = "; ".join(f"{kind}-src 'sha256-{digest}'" for kind, digest in sources.items())
    return text, f"default-src 'none'; {policy}; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
