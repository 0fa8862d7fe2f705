"""`cherry services`: what it says of a directory that holds none, or whose programs do not run."""

import pytest

from base.errors import MissingFileError
from flows.cli import main
from flows.services.layout import open_services


def test_a_directory_without_services_is_named_and_stays_as_it_is(tmp_path, capsys):
    for command in ("status", "down"):
        with pytest.raises(SystemExit) as ended:
            main(["services", command, "--directory", str(tmp_path)])
        assert ended.value.code == MissingFileError.exit_code
        assert f"no services in {tmp_path}. Make them: cherry services up" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_services_that_do_not_run_say_so(tmp_path, capsys):
    open_services(tmp_path)
    for command, told in (("status", "nothing runs. Start it: cherry services up"), ("down", "nothing ran")):
        with pytest.raises(SystemExit) as ended:
            main(["services", command, "--directory", str(tmp_path)])
        assert not ended.value.code
        assert told in capsys.readouterr().out
