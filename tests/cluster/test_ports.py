"""Ports: taken at once, or refused with the option that changes them."""

import socket

import pytest

from pagewire.cluster.errors import ConfigError, PortTaken
from pagewire.cluster.ports import bind, require_free

HOST = "127.0.0.1"


def test_bound_port_is_kept_and_does_not_listen_yet() -> None:
    with bind(HOST, 0, option="--port") as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port))
        with pytest.raises(PortTaken):
            bind(HOST, port, option="--port")


def test_taken_port_is_named_with_its_option() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} .*--dashboard-port 0"):
            require_free(HOST, port, option="--dashboard-port")


def test_free_port_is_found_and_left_free() -> None:
    port = require_free(HOST, 0, option="--port")
    with bind(HOST, port, option="--port") as bound:
        assert bound.getsockname()[1] == port


@pytest.mark.parametrize("host", ["192.0.2.77", "no such host"])
def test_foreign_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"{host}.*--host"):
        bind(host, 0, option="--port")
