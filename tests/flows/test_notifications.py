"""Addresses of notifications are read strictly and never told; tests/e2e/test_notifications.py sends to some."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore

from base.errors import ConfigError, MissingFileError
from flows.notifications import read_addresses
from flows.setup_command import POOL

# Apprise loads a plug-in with modules that later Pythons lack.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
SECRET = "mailtos://user:s3cret@example.com?to=team@example.com"


def test_a_file_has_an_address_a_line(tmp_path):
    file = tmp_path / "addresses"
    file.write_text(f"# on call\n\n  https://hooks.example.com/services/T0/B0/abc \n{SECRET}\n")
    assert read_addresses(file) == ["https://hooks.example.com/services/T0/B0/abc", SECRET]
    file.write_text("\n# nobody\n")
    assert read_addresses(file) == []


@pytest.mark.parametrize("line", ["nosuch://s3cret@host", "s3cret", "https://", "https:// s3cret", "mailtos://"])
def test_a_wrong_line_is_named_by_its_number_alone(tmp_path, line):
    file = tmp_path / "addresses"
    file.write_text(f"https://hooks.example.com/a\n{line}\n")
    with pytest.raises(ConfigError, match=r"addresses: line 2 is neither a webhook") as caught:
        read_addresses(file)
    assert "s3cret" not in str(caught.value)


def test_what_is_no_file_of_text_is_refused(tmp_path):
    with pytest.raises(MissingFileError):
        read_addresses(tmp_path / "none")
    with pytest.raises(MissingFileError):
        read_addresses(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_addresses(tmp_path / "binary")


def test_the_triggers_are_prefects_and_of_this_pool_alone():
    written = yaml.safe_load((ROOT / "automations.yaml").read_text())["notifications"]
    for values in written:
        trigger = AutomationCore.model_validate({**values, "actions": [{"type": "do-nothing"}]}).trigger
        assert trigger.match_related.root == {"prefect.resource.role": "work-pool", "prefect.resource.name": POOL}


def test_an_address_that_is_none_is_not_shown(tmp_path, capfd):
    file = tmp_path / "addresses"
    file.write_text("mailtos://me:hunter2@\n")
    with pytest.raises(ConfigError, match="line 1 is neither"):
        read_addresses(file)
    assert "hunter2" not in "".join(capfd.readouterr())
