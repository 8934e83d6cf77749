"""Mutual TLS 1.3 for the sockets that carry KV pages.

Both ends show a certificate of one authority, which signs nothing but workers: whoever has one is
a worker, at whatever address. Nobody else gets as far as the handshake of a transport.
"""

import contextlib
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pagewire.kv_transfer.socket_io import readable, writable
from pagewire.kv_transfer.transport import TransportError


class TlsError(TransportError):
    """Certificates that cannot be used, or a peer that has none of our authority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where a worker's certificate lies, and that of the authority of all workers. PEM."""

    cert: str  # followed by those of intermediate authorities, if there are any
    key: str  # not encrypted
    ca: str


class TlsSocket(ssl.SSLSocket):
    """A TLS connection with the calls that `socket_io` makes on a plain non-blocking socket."""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Fill as much of `buffer` as has arrived, which TLS hands out in records of 16 KiB."""
        view = memoryview(buffer)[:nbytes]
        count = 0
        try:
            while count < len(view):
                num_received = super().recv_into(view[count:], None, flags)
                if num_received == 0:  # the end, which the next call says again
                    break
                count += num_received
        except ssl.SSLWantReadError:
            if count == 0:
                raise BlockingIOError from None
        return count

    def sendmsg(  # type: ignore[override]  # SSLSocket has none
        self, buffers: Iterable[bytes | memoryview]
    ) -> int:
        """Send as much of `buffers` as the socket takes."""
        count = 0
        try:
            for buffer in buffers:
                rest = memoryview(buffer)
                while rest:
                    num_sent = self.send(rest)
                    count += num_sent
                    rest = rest[num_sent:]
        except ssl.SSLWantWriteError:
            if count == 0:
                raise BlockingIOError from None
        return count

    def shutdown(self, how: int) -> None:
        """End the connection, beneath TLS.

        SSLSocket would forget that it is one, and then hand out what is still encrypted.
        """
        socket.socket.shutdown(self, how)


class Tls:
    """Makes TLS connections out of plain ones, with the certificates of one worker.

    Raises TlsError, which names the file, when they cannot be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, files)
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, files)
        self._server.num_tickets = 0  # nobody resumes a session

    async def secure(self, sock: socket.socket, *, is_server: bool) -> socket.socket:
        """The TLS connection over `sock`, which it takes over.

        Raises ssl.SSLError when the peer is not one of ours, another OSError when it is gone. A
        client whose certificate is refused only hears of it when it reads.
        """
        context = self._server if is_server else self._client
        secured = context.wrap_socket(sock, server_side=is_server, do_handshake_on_connect=False)
        with contextlib.ExitStack() as undo:
            undo.callback(secured.close)
            await _shake_hands(secured)
            undo.pop_all()
        return secured


def explain(error: ssl.SSLError) -> str:
    """What a TLS connection failed of, and the remedy."""
    reason = (error.reason or str(error)).lower().replace("_", " ")
    return (
        f"TLS failed: {reason}; give both workers kv_tls_cert, kv_tls_key and kv_tls_ca, "
        "with certificates of one authority that have not expired"
    )


async def _shake_hands(secured: ssl.SSLSocket) -> None:
    while True:
        try:
            secured.do_handshake()
            return
        except ssl.SSLWantReadError:
            await readable(secured)
        except ssl.SSLWantWriteError:
            await writable(secured)


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # who it is, the authority says and not an address
    context.verify_mode = ssl.CERT_REQUIRED
    context.sslsocket_class = TlsSocket
    _load_authority(context, files.ca)
    _load_certificate(context, files)
    return context


def _load_authority(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:  # ssl.SSLError is one
        raise TlsError(
            f"kv_tls_ca: cannot read {path}: {error}; give a file of PEM certificates"
        ) from error


def _load_certificate(context: ssl.SSLContext, files: TlsFiles) -> None:
    for name, path in (("kv_tls_cert", files.cert), ("kv_tls_key", files.key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise TlsError(f"{name}: cannot read {path}: {error.strerror}") from error
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as error:
        raise TlsError(
            f"kv_tls_cert, kv_tls_key: {files.cert} and {files.key} are no PEM certificate with "
            f"its own key, unencrypted: {error.reason or error}"
        ) from error


def _no_password() -> str:
    """Instead of a question on the terminal, for a key that is encrypted: it then is no key."""
    return ""
