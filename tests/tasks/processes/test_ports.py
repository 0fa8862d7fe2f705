"""Ports: what is told of one that another process has, and that a port is checked by listening there."""

import os
import re
import socket

import pytest

from base.errors import ConfigError, PortInUseError
from tasks.processes.ports import check_port, free_port


def test_a_port_in_use_is_told_with_its_holder_and_a_port_that_is_free():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError) as told:
            check_port("127.0.0.1", port)
    assert str(told.value).startswith(f"serve.port: port {port} on 127.0.0.1 is in use by another process (")
    assert f"pid {os.getpid()})" in str(told.value)
    offered = int(re.search(r"serve\.port=(\d+)", str(told.value)).group(1))
    assert offered > port
    check_port("127.0.0.1", offered)


def test_a_port_on_every_address_is_in_use_where_one_address_is():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUseError):
        check_port("0.0.0.0", taken.getsockname()[1])


def test_a_free_port_and_any_port_can_be_listened_on_afterwards():
    port = free_port()
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", 0)
    socket.create_server(("127.0.0.1", port)).close()


def test_an_address_of_another_machine_is_the_configs_fault():
    with pytest.raises(ConfigError, match=r"serve\.host and serve\.port: a server cannot listen on 192\.0\.2\.1:8080"):
        check_port("192.0.2.1", 8080)
