"""Configuration of supervisord: private, and with every value as it was given."""

import configparser
import stat

import pytest

from base.errors import MissingFileError
from flows.services import programs
from flows.services.layout import open_services


def test_the_configuration_is_private_and_holds_no_password_on_a_command_line(tmp_path):
    services = open_services(tmp_path)
    file = programs.write_config(services)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    parser = configparser.RawConfigParser()
    parser.read(file)
    sections = [parser[name] for name in parser.sections() if name.startswith("program:")]
    assert [section.name for section in sections] == [
        "program:postgres",
        "program:s3",
        "program:prefect",
        "program:mlflow",
    ]
    # Everybody on a machine may read the command line of a process.
    commands = " ".join(section["command"] for section in sections)
    assert not [secret for secret in vars(services.passwords).values() if secret in commands]


def test_a_program_that_is_not_installed_is_named_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingFileError, match=r"PostgreSQL's no-such-program .* apt-get install postgresql"):
        programs.postgres_program("no-such-program")
