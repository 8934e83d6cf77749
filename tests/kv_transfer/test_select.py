"""Which transports a worker starts and a pair uses."""

import sys

import pytest

from pagewire.kv_transfer.select import choose, create_transports, probe
from pagewire.kv_transfer.transport import TransportError

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


@pytest.mark.skipif(not probe().usable, reason="this machine has no UCX")
def test_ucx_first_where_it_works() -> None:
    found = probe()
    assert found.ucxx_version and found.ucx_version
    assert "tcp" in found.transports
    assert kinds("ucx")[0] == ["ucx"]
    assert kinds("auto")[0] == ["ucx", "tcp"]


@pytest.mark.usefixtures("without_ucxx")
def test_without_ucxx_auto_says_why_it_is_tcp() -> None:
    offered, explanation = kinds("auto")
    assert offered == ["tcp"]
    assert "pip install 'pagewire[ucx]'" in explanation
    assert not probe().usable
    assert probe().transports == ()


@pytest.mark.usefixtures("without_ucxx")
def test_without_ucxx_ucx_is_an_error_with_a_remedy() -> None:
    with pytest.raises(TransportError, match="pip install"):
        create_transports("ucx", ME, Nobody(), "127.0.0.1")


def test_an_unknown_kind_names_the_choices() -> None:
    with pytest.raises(TransportError, match="auto, ucx or tcp"):
        create_transports("pigeon", ME, Nobody(), "127.0.0.1")


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (["ucx", "tcp"], ["ucx", "tcp"], "ucx"),
        (["tcp", "ucx"], ["ucx"], "ucx"),
        (["ucx", "tcp"], ["tcp"], "tcp"),
        (["tcp"], ["tcp", "newer"], "tcp"),
    ],
)
def test_choose(mine: list[str], theirs: list[str], expected: str) -> None:
    assert choose(mine, theirs) == choose(theirs, mine) == expected


@pytest.mark.parametrize("theirs", [[], ["ucx"], ["newer"]])
def test_nothing_in_common(theirs: list[str]) -> None:
    with pytest.raises(TransportError, match="transport=auto"):
        choose(["tcp"], theirs)
