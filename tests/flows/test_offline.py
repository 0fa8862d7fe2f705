"""What Prefect has understood of the `cherry` command's defaults, in an interpreter that has imported nothing yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stranger import UID, run_as_stranger

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
from flows.cli import main
try:
    main(["run", "missing.yaml"])
except SystemExit as ended:
    assert ended.code == 12, ended.code
from prefect.settings import get_current_settings
found = get_current_settings()
services = found.server.services
import httpx, os
from prefect.client.orchestration import PrefectClient
client = PrefectClient("http://127.0.0.1:9/api")._client
print(json.dumps({
    "loopback": type(client._transport_for_url(httpx.URL("http://127.0.0.1:9/api"))._pool).__name__,
    "elsewhere": type(client._transport_for_url(httpx.URL("https://prefect.example/api"))._pool).__name__,
    "no_proxy": os.environ["no_proxy"],
    "timeout": found.server.ephemeral.startup_timeout_seconds,
    "analytics": found.server.analytics_enabled,
    "services": sorted(name for name, one in services if getattr(one, "enabled", None) is True),
}))
"""


def settings(tmp_path, **given):
    left_out = ("PREFECT_", "DO_NOT_TRACK")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out) and "proxy" not in k.lower()}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect"), **given}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_home_for_prefect_is_made_with_its_parents(tmp_path):
    settings(tmp_path, PREFECT_HOME=str(tmp_path / "not" / "yet" / "there"))
    assert (tmp_path / "not" / "yet" / "there").is_dir()


def test_the_defaults_reach_prefect_and_leave_only_what_records_a_run(tmp_path):
    found = settings(tmp_path)
    assert found["timeout"] == 120
    assert found["analytics"] is False
    assert found["services"] == ["event_persister", "task_run_recorder"]


def test_a_persons_own_settings_win(tmp_path):
    own = {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "7",
        "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "true",
    }
    found = settings(tmp_path, **own)
    assert found["timeout"] == 7
    assert "scheduler" in found["services"]


@pytest.mark.parametrize(
    ("proxies", "pool"),
    [
        ({"http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}, "AsyncHTTPProxy"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "AsyncSOCKSProxy"),
        ({"all_proxy": "socks5h://127.0.0.1:9", "NO_PROXY": "localhost, intern.example"}, "AsyncSOCKSProxy"),
    ],
)
def test_prefects_client_reaches_loopback_without_a_proxy_and_others_through_it(tmp_path, proxies, pool):
    found = settings(tmp_path, **proxies)
    assert (found["loopback"], found["elsewhere"]) == ("AsyncConnectionPool", pool)
    assert "127.0.0.1" in found["no_proxy"]
    assert ("intern.example" in found["no_proxy"]) is ("NO_PROXY" in proxies)


HOMES = """
import os
from flows.offline import set_offline_defaults
set_offline_defaults()
print(os.environ.get("PREFECT_HOME"), os.environ.get("PREFECT_PROFILES_PATH"))
"""


@pytest.mark.parametrize("home", ["", "own", "closed", "missing", "used"])
def test_prefect_has_a_home_where_the_users_own_cannot_be_written(tmp_path, home):
    for name in ("own", "closed", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / ".prefect").mkdir(parents=True)  # a profile that was mounted, say
    (tmp_path / "used" / ".prefect" / "profiles.toml").write_text('active = "team"\n')
    for name in ("own", "tmp"):
        os.chown(tmp_path / name, UID, UID)
    given = {"TMPDIR": str(tmp_path / "tmp")} | ({"HOME": str(tmp_path / home)} if home else {})
    ended = run_as_stranger([sys.executable, "-c", HOMES], folder=tmp_path, **given)
    found, profiles = ended.stdout.split()
    made = tmp_path / "tmp" / f"prefect-{UID}"
    assert found == ("None" if home == "own" else str(made)), ended.stderr
    assert profiles == (str(tmp_path / "used" / ".prefect" / "profiles.toml") if home == "used" else "None")
    assert (tmp_path / "own" / ".prefect").is_dir() == (home == "own")
    if home != "own":
        assert (made.stat().st_mode & 0o777, made.stat().st_uid) == (0o700, UID)


def test_a_directory_that_somebody_else_has_put_there_is_not_prefects_home(tmp_path):
    (tmp_path / f"prefect-{UID}").mkdir()
    tmp_path.chmod(0o777)
    os.chown(tmp_path, UID, UID)
    given = {"TMPDIR": str(tmp_path), "HOME": "/nonexistent"}
    ended = run_as_stranger([sys.executable, "-c", HOMES], folder=tmp_path, **given)
    found = Path(ended.stdout.split()[0])
    assert found.parent == tmp_path, ended.stderr
    assert found.name != f"prefect-{UID}"
    assert found.stat().st_uid == UID
