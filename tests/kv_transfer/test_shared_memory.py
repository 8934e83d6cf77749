"""Memory offered to a peer: what can be opened, what is refused, and what is left behind."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagewire.kv_transfer.shared_memory import (
    Offer,
    SharedMemoryError,
    domain,
    open_offer,
    require_shared_memory,
)

NUM_BYTES = 1 << 16
ROOT = Path(__file__).parents[2]
OFFER_AND_WAIT = f"""
import sys
from pagewire.kv_transfer.shared_memory import Offer
offer = Offer({NUM_BYTES})
offer.segment.view[100:105] = b"hello"
print(offer.note.hex(), flush=True)
sys.stdin.read()
"""


@contextmanager
def offered(num_bytes: int = NUM_BYTES) -> Iterator[Offer]:
    offer = Offer(num_bytes)
    try:
        yield offer
    finally:
        offer.close()


def note(descriptor: int, token: bytes = bytes(16)) -> bytes:
    return struct.pack("!II16s", os.getpid(), descriptor, token)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_see_the_same_bytes() -> None:
    with offered() as offer:
        peer = open_offer(offer.note, NUM_BYTES)
        assert peer.proof == offer.segment.proof
        offer.segment.view[-5:] = b"there"
        assert bytes(peer.view[-5:]) == b"there"
        peer.close()


def test_a_peer_cannot_write() -> None:
    with offered() as offer:
        peer = open_offer(offer.note, NUM_BYTES)
        with pytest.raises(TypeError, match="read-only"):
            peer.view[0] = 1
        peer.close()


def test_what_was_withdrawn_cannot_be_opened_and_stays_mapped() -> None:
    with offered() as offer:
        peer = open_offer(offer.note, NUM_BYTES)
        offer.withdraw()
        with pytest.raises(SharedMemoryError, match="same container"):
            open_offer(offer.note, NUM_BYTES)
        offer.segment.view[:3] = b"yes"
        assert bytes(peer.view[:3]) == b"yes"
        peer.close()


def test_nobody_can_shrink_it() -> None:
    with offered() as offer:
        _, number, _ = struct.unpack("!II16s", offer.note)
        with pytest.raises(PermissionError):
            os.ftruncate(number, 0)
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{number}", 0)


@pytest.mark.parametrize("bad", [b"", b"short", bytes(24), bytes(25)])
def test_a_note_that_names_nothing(bad: bytes) -> None:
    with pytest.raises(SharedMemoryError):
        open_offer(bad, NUM_BYTES)


def test_another_token_or_size_is_refused() -> None:
    with offered() as offer:
        with pytest.raises(SharedMemoryError, match="another token"):
            open_offer(offer.note[:-1] + bytes([offer.note[-1] ^ 1]), NUM_BYTES)
        with pytest.raises(SharedMemoryError, match="not 4096 sealed bytes"):
            open_offer(offer.note, 4096)


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(NUM_BYTES))
    with path.open("rb") as file, pytest.raises(SharedMemoryError, match="no shared memory"):
        open_offer(note(file.fileno()), NUM_BYTES)


def test_memory_that_can_shrink_is_refused() -> None:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, NUM_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        with pytest.raises(SharedMemoryError, match="sealed"):
            open_offer(note(descriptor), NUM_BYTES)
    finally:
        os.close(descriptor)


def test_a_pipe_that_nobody_writes_to_blocks_nobody() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(SharedMemoryError):
            open_offer(note(reader), NUM_BYTES)
    finally:
        os.close(reader)
        os.close(writer)


def test_refusals_and_closed_offers_leave_no_descriptor() -> None:
    before = num_descriptors()
    for _ in range(5):
        with offered() as offer:
            open_offer(offer.note, NUM_BYTES).close()
            with pytest.raises(SharedMemoryError):
                open_offer(offer.note, 4096)
            with pytest.raises(SharedMemoryError):
                open_offer(note(offer_descriptor(offer)), NUM_BYTES)
    assert num_descriptors() <= before


def offer_descriptor(offer: Offer) -> int:
    number: int = struct.unpack("!II16s", offer.note)[1]
    return number


def test_too_much_memory_is_an_error_with_a_remedy() -> None:
    with pytest.raises(SharedMemoryError, match="use tcp"):
        Offer(1 << 62)


def test_a_system_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_shared_memory()
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(SharedMemoryError, match="use ucx or tcp"):
        require_shared_memory()


def test_the_domain_is_that_of_other_processes_here() -> None:
    code = "from pagewire.kv_transfer.shared_memory import domain; print(domain())"
    assert python(code).communicate()[0].decode().strip() == domain()


def test_memory_outlives_its_killed_owner_and_has_no_name() -> None:
    names = set(os.listdir("/dev/shm"))
    owner = python(OFFER_AND_WAIT)
    assert owner.stdout is not None
    segment = open_offer(bytes.fromhex(owner.stdout.readline().decode()), NUM_BYTES)
    assert not [name for name in set(os.listdir("/dev/shm")) - names if "pagewire" in name]
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert bytes(segment.view[100:105]) == b"hello"
    segment.close()


def python(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
