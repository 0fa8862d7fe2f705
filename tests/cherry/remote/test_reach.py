"""Connections between hosts: a port that listens is reached, one that does not is named."""

from __future__ import annotations

import socket

from cherry.remote.reach import listen, unreachable


def test_who_listens_is_reached_again_and_again_and_who_does_not_is_named():
    port = listen()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = closed.getsockname()[1]
        places = [
            {"host": "a", "address": "127.0.0.1", "port": port},
            {"host": "b", "address": "127.0.0.1", "port": nobody},
        ]
        for _ in range(3):
            assert unreachable(places) == ["b"]
    assert unreachable([]) == []
