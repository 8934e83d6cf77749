"""Memory that two processes of one machine share, with no name to guess or to leave behind.

It is anonymous (memfd_create): the owner tells the peer which descriptor it is, the peer opens that
through /proc, and the kernel frees it with the last process that has it, however that one ends. It
is sealed against shrinking, which would crash whoever reads behind the new end.
"""

import fcntl
import hashlib
import hmac
import mmap
import os
import secrets
import struct

from pagewire.kv_transfer.transport import TransportError

_TOKEN_BYTES = 16
_NOTE = struct.Struct(f"!II{_TOKEN_BYTES}s")  # pid, descriptor, token


class SharedMemoryError(TransportError):
    """Memory that cannot be made, or that is not what a peer said it was."""


class Segment:
    """One mapping of shared memory.

    It begins with a token, by which a peer knows that it opened the right memory, and a proof,
    which it sends back: so the owner knows, too. Both may be overwritten once that is done.
    """

    def __init__(self, descriptor: int, num_bytes: int, *, writable: bool) -> None:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._mapping = mmap.mmap(descriptor, num_bytes, prot=access)
        self.view = memoryview(self._mapping)  # [num_bytes]

    @property
    def token(self) -> bytes:
        return bytes(self.view[:_TOKEN_BYTES])

    @property
    def proof(self) -> bytes:
        return bytes(self.view[_TOKEN_BYTES : 2 * _TOKEN_BYTES])

    def close(self) -> None:
        """Unmap it. Whoever uses `view` later gets a ValueError, never other memory."""
        self.view.release()
        self._mapping.close()


class Offer:
    """Memory of this process that one peer may open.

    Raises SharedMemoryError when this machine cannot make it.
    """

    def __init__(self, num_bytes: int) -> None:
        try:
            self._descriptor: int | None = os.memfd_create("pagewire", os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError) as error:
            raise SharedMemoryError(
                f"this system has no anonymous shared memory ({error}); use ucx or tcp"
            ) from error
        try:
            os.ftruncate(self._descriptor, num_bytes)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _seals())
            self.segment = Segment(self._descriptor, num_bytes, writable=True)
        except OSError as error:
            self.withdraw()
            raise SharedMemoryError(
                f"cannot share {num_bytes} bytes of memory: {error}; free some, or use tcp"
            ) from error
        self.segment.view[: 2 * _TOKEN_BYTES] = secrets.token_bytes(2 * _TOKEN_BYTES)
        self.note = _NOTE.pack(os.getpid(), self._descriptor, self.segment.token)

    def withdraw(self) -> None:
        """Let nobody else open it; mappings stay. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def close(self) -> None:
        """Withdraw it and give the memory back, when no peer has it."""
        self.withdraw()
        self.segment.close()


def open_offer(note: bytes, num_bytes: int) -> Segment:
    """Map what a peer offers in `note`, for reading.

    Raises SharedMemoryError when there is nothing like that, or when it is not what it should be.
    """
    try:
        pid, number, token = _NOTE.unpack(note)
        # Neither of the flags matters to memory; a liar may have named a terminal or a pipe.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(f"/proc/{pid}/fd/{number}", flags)
    except (struct.error, OSError) as error:
        raise SharedMemoryError(
            f"cannot open the memory of the peer: {error}; it must run on this machine, in the "
            "same container and as the same user"
        ) from error
    try:
        _require_sealed(descriptor, num_bytes)
        segment = Segment(descriptor, num_bytes, writable=False)
    except OSError as error:
        raise SharedMemoryError(f"the peer offers what is no shared memory: {error}") from error
    finally:
        os.close(descriptor)
    if not hmac.compare_digest(segment.token, token):
        segment.close()
        raise SharedMemoryError("the memory that the peer offers has another token than it said")
    return segment


def require_shared_memory() -> None:
    """Raise SharedMemoryError, with a remedy, where processes cannot share memory this way."""
    offer = Offer(mmap.PAGESIZE)
    try:
        open_offer(offer.note, mmap.PAGESIZE).close()
    finally:
        offer.close()


def domain() -> str:
    """16 characters, the same for all processes that can open each other's offers, as far as can
    be told: those of one boot of one machine, in one container with one loopback, of one user.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read()
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net")]
    where = f"{boot} {namespaces} {os.getuid()}"
    return hashlib.blake2b(where.encode(), digest_size=8).hexdigest()


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _require_sealed(descriptor: int, num_bytes: int) -> None:
    """Raises OSError for what is no memfd, SharedMemoryError for one that could shrink."""
    sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if sealed & _seals() != _seals() or os.fstat(descriptor).st_size != num_bytes:
        raise SharedMemoryError(f"the peer offers what is not {num_bytes} sealed bytes")
