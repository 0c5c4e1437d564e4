"""Ports that are chosen before their servers start."""

from __future__ import annotations

import socket
import sys

import pytest

from service.ray_serve.environment import hold_port


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody can share a held port")
def test_a_held_port_is_its_servers_alone() -> None:
    with hold_port() as held, socket.socket() as other, socket.socket() as server:
        address = held.getsockname()
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
        with socket.create_connection(address, timeout=5):
            pass
