"""Slurm's own programs where they cannot answer: not configured, or without a controller; test_attempt.py has more."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from base.errors import ConfigError, ServiceError
from cherry.slurm import commands

pytestmark = pytest.mark.skipif(bool(commands.missing_programs()), reason="no Slurm client here (Debian: slurm-client)")
_CONF = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={port}
AuthType=auth/munge
NodeName=node1 CPUs=1
PartitionName=main Nodes=ALL Default=YES
"""


@pytest.mark.skipif(Path("/etc/slurm/slurm.conf").exists(), reason="Slurm is configured here")
def test_programs_that_are_not_configured_say_what_to_do(monkeypatch):
    monkeypatch.delenv("SLURM_CONF", raising=False)
    for ask in (lambda: commands.jobs_named("a"), lambda: commands.submit("#!/bin/bash\n", test_only=True)):
        with pytest.raises(ConfigError, match=r"is installed here, and not configured .* login node .*SLURM_CONF"):
            ask()


def test_a_configuration_that_is_not_there_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    with pytest.raises(ConfigError, match=r"SLURM_CONF names .*/none\.conf, which does not exist\. Start the run on"):
        commands.jobs_named("a")


@pytest.mark.slow
@pytest.mark.parametrize("announce", [True, False])
def test_a_controller_that_lets_wait_is_told_of_at_once_with_the_time_and_is_not_the_caller_s_fault(
    monkeypatch, tmp_path, capfd, announce
):
    with socket.socket() as probe:  # nothing listens on its port afterwards
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "slurm.conf").write_text(_CONF.format(port=port))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(ServiceError, match=r"controller does not answer: .*`scontrol ping`.* same command again"):
        commands.show("1", announce=announce)
    note = r"waiting for Slurm's controller, which does not answer scontrol, until \d\d:\d\d:\d\d at most\n"
    assert re.fullmatch(note if announce else "", capfd.readouterr().err)


def test_a_program_that_is_ended_while_it_waits_leaves_none_behind(monkeypatch, tmp_path):
    """Ctrl-C comes from a program that stands in for squeue: nobody else knows when it waits."""
    (tmp_path / "squeue").write_text("#!/bin/sh\necho $$ > pid\nread -r _\nkill -INT $PPID\nexec sleep 600\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(shutil.which('sleep') or '').parent}")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        commands.jobs_named("a")
    assert not Path(f"/proc/{int((tmp_path / 'pid').read_text())}").exists()
