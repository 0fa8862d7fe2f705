"""What Prefect has understood of the `cherry` command's defaults, in an interpreter that has imported nothing yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
print(json.dumps({
    "timeout": found.server.ephemeral.startup_timeout_seconds,
    "analytics": found.server.analytics_enabled,
    "services": sorted(name for name, one in services if getattr(one, "enabled", None) is True),
}))
"""


def settings(tmp_path, **given):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "DO_NOT_TRACK"))}
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
