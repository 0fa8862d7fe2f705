"""Settings of the services: passwords that are made once and shown nowhere, and what cannot be read."""

import json
import stat

import pytest

from base.errors import ConfigError, MissingFileError
from flows.services.layout import Ports, open_existing, open_services


def test_passwords_are_made_once_for_their_owner_only_and_are_in_no_repr(tmp_path):
    made = open_services(tmp_path / "services", Ports(prefect=14200))
    again = open_services(tmp_path / "services")
    assert again == made
    assert again.ports == Ports(prefect=14200)
    assert stat.S_IMODE((tmp_path / "services" / "settings.json").stat().st_mode) == 0o600
    shown = repr(made) + repr(made.passwords)
    assert not [secret for secret in vars(made.passwords).values() if secret in shown]
    assert open_services(tmp_path / "others").passwords != made.passwords


def test_what_is_not_there_cannot_be_read_or_has_other_ports_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="cherry services up --directory"):
        open_existing(tmp_path)
    open_services(tmp_path)
    with pytest.raises(ConfigError, match="these services have other ports"):
        open_services(tmp_path, Ports(mlflow=1))
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"settings.json: cannot be read .* holds the passwords"):
        open_services(tmp_path)


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="for the socket in it"):
        open_services(tmp_path / ("d" * 120))
    assert not (tmp_path / ("d" * 120)).exists()


def test_a_port_of_s3_that_has_none_above_it_is_refused_with_the_highest_one(tmp_path):
    open_services(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["ports"]["s3_filer"] = 60_000
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"settings.json: ports of s3 are at most 55535, .* \(got 70000\)"):
        open_services(tmp_path)
