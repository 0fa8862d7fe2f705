"""The server's page: for browsers alone, with a policy that lets its own script run and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable

import httpx

from anything.testing import EchoEngine

Serve = Callable[..., str]


def test_a_browser_gets_the_page_and_a_program_json(serve: Serve, ask: httpx.Client) -> None:
    url = serve(EchoEngine("v7"))
    seen = ask.get(url + "/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert seen.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>Anything</title>" in seen.text
    assert ask.get(url + "/").headers["content-type"] == "application/json"
    assert ask.head(url + "/", headers={"accept": "text/html"}).status_code == 200


def test_its_policy_allows_its_own_script_and_style_and_no_other(serve: Serve, ask: httpx.Client) -> None:
    seen = ask.get(serve(EchoEngine("v7")) + "/", headers={"accept": "text/html"})
    policy = seen.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    for kind in ("script", "style"):
        (content,) = re.findall(f"<{kind}>(.*?)</{kind}>", seen.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    # What the policy would block, the page must not need; what others wrote is set as text, never as markup.
    assert not re.findall(r"\b(style|on[a-z]+)=", re.sub(r"<(script|style)>.*?</\1>", "", seen.text, flags=re.DOTALL))
    assert "innerHTML" not in seen.text
