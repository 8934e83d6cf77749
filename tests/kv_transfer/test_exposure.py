"""KV pages cross no network in the clear unless the operator says so."""

from pathlib import Path

import pytest
from certificates import Authority

from pagewire.kv_transfer.exposure import ExposureError, is_loopback, require_protected
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.select import KINDS, create_transports
from pagewire.kv_transfer.tls import TlsFiles
from pagewire.kv_transfer.transport import Transport, TransportError

PUBLIC = "192.0.2.7"  # of no machine: nothing here listens
ME = b"m" * 16


class Nobody:
    """A Handler that is never called."""

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        raise AssertionError

    def deliver(self, peer: bytes, header: bytes) -> None:
        raise AssertionError

    def lost(self, peer: bytes, reason: str) -> None:
        raise AssertionError


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return Authority(tmp_path).worker("worker")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("192.168.1.5", False),
        ("0.0.0.0", False),
        ("::", False),
        ("gpu-node-7", False),
    ],
)
def test_only_loopback_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shm"])
def test_in_the_clear_only_on_loopback_or_where_the_network_is_private(kind: str) -> None:
    require_protected(kind, "127.0.0.1", has_tls=False, is_private=False)
    require_protected(kind, PUBLIC, has_tls=False, is_private=True)
    with pytest.raises(ExposureError, match=r"192\.0\.2\.7.*kv_tls_cert.*insecure_kv"):
        require_protected(kind, PUBLIC, has_tls=False, is_private=False)


def test_shared_memory_leaves_no_machine() -> None:
    require_protected("shm", PUBLIC, has_tls=False, is_private=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("auto", "tcp")])
@pytest.mark.parametrize("is_private", [False, True])
def test_tls_is_refused_where_it_would_be_in_vain(kind: str, is_private: bool) -> None:
    with pytest.raises(ExposureError, match="cannot encrypt; choose auto or tcp"):
        require_protected(kind, PUBLIC, has_tls=True, is_private=is_private)


def test_a_worker_does_not_start_unprotected() -> None:
    with pytest.raises(TransportError, match="in the clear"):
        create_transports("auto", ME, Nobody(), PUBLIC)


def kinds(transports: tuple[Transport, ...]) -> set[str]:
    return {transport.kind for transport in transports}


def test_with_tls_auto_leaves_out_what_cannot_encrypt(files: TlsFiles) -> None:
    choice = create_transports("auto", ME, Nobody(), PUBLIC, tls=files)
    assert kinds(choice.transports) <= {"shm", "tcp"}
    assert "over tcp with TLS: UCX cannot encrypt" in choice.explanation


def test_on_loopback_or_a_private_network_auto_takes_all(files: TlsFiles) -> None:
    everything = kinds(create_transports("auto", ME, Nobody(), "127.0.0.1").transports)
    with_tls = create_transports("auto", ME, Nobody(), "127.0.0.1", tls=files)
    private = create_transports("auto", ME, Nobody(), PUBLIC, is_private=True)
    assert kinds(with_tls.transports) == kinds(private.transports) == everything
