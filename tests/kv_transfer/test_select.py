"""Which transports a worker starts and a pair uses."""

import sys
from collections.abc import Sequence

import pytest

from pagewire.kv_transfer.candidates import candidates
from pagewire.kv_transfer.local import LocalHub, LocalTransport
from pagewire.kv_transfer.select import create_transports, probe
from pagewire.kv_transfer.transport import Transport, TransportError

ME = b"m" * 16


class Nobody:
    """A Handler that is never called."""

    def place(self, peer: bytes, header: bytes, length: int) -> None:
        raise AssertionError

    def deliver(self, peer: bytes, header: bytes) -> None:
        raise AssertionError

    def lost(self, peer: bytes, reason: str) -> None:
        raise AssertionError


def kinds(kind: str) -> tuple[list[str], str]:
    choice = create_transports(kind, ME, Nobody(), "127.0.0.1")
    return [transport.kind for transport in choice.transports], choice.explanation


@pytest.fixture
def without_ucxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", None)  # makes `import ucxx` fail


def test_tcp_is_what_was_asked_for() -> None:
    assert kinds("tcp")[0] == ["tcp"]


def test_pages_on_a_gpu_are_said_to_go_through_host_memory() -> None:
    choice = create_transports("tcp", ME, Nobody(), "127.0.0.1", device="cuda")
    assert "pages go through pinned host memory" in choice.explanation
    assert "pinned" not in kinds("tcp")[1]


def test_pages_on_several_gpus_always_do() -> None:
    choice = create_transports("tcp", ME, Nobody(), "127.0.0.1", device="cuda", num_devices=4)
    assert choice.explanation.endswith("; pages of 4 GPUs go through pinned host memory")


def test_shm_alone() -> None:
    assert kinds("shm")[0] == ["shm"]


def test_gloo_only_where_it_is_asked_for() -> None:
    assert kinds("gloo")[0] == ["gloo"]
    assert "gloo" not in kinds("auto")[0]


def test_without_shared_memory_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    found, explanation = kinds("auto")
    assert "shm" not in found and found[-1] == "tcp"
    assert "shm is not usable: this system has no anonymous shared memory" in explanation
    with pytest.raises(TransportError, match="use ucx or tcp"):
        kinds("shm")


@pytest.mark.skipif(not probe().usable, reason="this machine has no UCX")
def test_ucx_first_where_it_works() -> None:
    found = probe()
    assert found.ucxx_version and found.ucx_version
    assert "tcp" in found.transports
    assert kinds("ucx")[0] == ["ucx"]
    assert kinds("auto")[0] == ["shm", "ucx", "tcp"]


@pytest.mark.usefixtures("without_ucxx")
def test_without_ucxx_auto_says_why_it_is_tcp() -> None:
    found, explanation = kinds("auto")
    assert found == ["shm", "tcp"]
    assert "pip install 'pagewire[ucx]'" in explanation
    assert not probe().usable
    assert probe().transports == ()


@pytest.mark.usefixtures("without_ucxx")
def test_without_ucxx_ucx_is_an_error_with_a_remedy() -> None:
    with pytest.raises(TransportError, match="pip install"):
        create_transports("ucx", ME, Nobody(), "127.0.0.1")


def test_an_unknown_kind_names_the_choices() -> None:
    with pytest.raises(TransportError, match="auto, shm, ucx, nccl, gloo, tcp"):
        create_transports("pigeon", ME, Nobody(), "127.0.0.1")


def started(kinds: Sequence[str]) -> dict[str, Transport]:
    """Transports that know who shares memory with them: all at an address that ends with `/me`."""

    class Reaching(LocalTransport):
        def __init__(self, kind: str) -> None:
            super().__init__(hub=LocalHub(), incarnation=ME, handler=Nobody())
            self.kind = kind

        def obstacle(self, address: bytes) -> str | None:
            if self.kind == "shm" and not address.endswith(b"/me"):
                return "it runs on another machine"
            return None

    return {kind: Reaching(kind) for kind in kinds}


def offered(kinds: Sequence[str], domain: bytes = b"me") -> list[tuple[str, bytes]]:
    return [(kind, b"host:1/" + domain) for kind in kinds]


@pytest.mark.parametrize(
    ("mine", "theirs", "domain", "expected"),
    [
        (["shm", "ucx", "tcp"], ["shm", "ucx", "tcp"], b"me", ["shm", "ucx", "tcp"]),
        (["tcp", "ucx", "shm"], ["tcp", "shm", "ucx"], b"me", ["shm", "ucx", "tcp"]),
        (["shm", "ucx", "tcp"], ["shm", "ucx", "tcp"], b"other", ["ucx", "tcp"]),
        (["shm", "tcp"], ["shm", "ucx", "tcp"], b"other", ["tcp"]),
        (["tcp"], ["tcp", "newer"], b"me", ["tcp"]),
    ],
)
def test_candidates_come_best_first(
    mine: list[str], theirs: list[str], domain: bytes, expected: list[str]
) -> None:
    found = candidates(started(mine), offered(theirs, domain))
    assert [candidate.transport.kind for candidate in found] == expected


def test_a_candidate_says_why_it_is_no_better_one() -> None:
    first, second = candidates(
        started(["shm", "ucx", "tcp"]), offered(["shm", "ucx", "tcp"], b"other")
    )
    assert first.reason == "not shm: it runs on another machine"
    assert second.reason.endswith("not ucx: no connection")


@pytest.mark.parametrize("theirs", [[], ["ucx"], ["newer"]])
def test_nothing_in_common(theirs: list[str]) -> None:
    with pytest.raises(TransportError, match="transport=auto"):
        candidates(started(["tcp"]), offered(theirs))
