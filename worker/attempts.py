"""The attempts that a worker serves, and the keys of those that it has finished with. Pure."""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from pagewire.proto import worker_pb2 as pb
from pagewire.worker.identity import AttemptKey
from pagewire.worker.ledger import EndedAttempts


class Attempt(Protocol):
    """What a worker keeps of one attempt."""

    key: AttemptKey
    route: pb.Route  # of the command that brought it: its sender is the router


Kept = TypeVar("Kept", bound=Attempt)


class Attempts(Generic[Kept]):
    """By key. A late or repeated command for one that has ended finds it known."""

    def __init__(self) -> None:
        self._live: dict[AttemptKey, Kept] = {}
        self._ended = EndedAttempts()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Kept]:
        """Those that live, in order of their begin. They may end meanwhile."""
        return iter(list(self._live.values()))

    def __contains__(self, attempt: Kept) -> bool:
        """Whether this very attempt lives."""
        return self._live.get(attempt.key) is attempt

    def knows(self, key: AttemptKey) -> bool:
        """Whether an attempt lives, or has ended lately."""
        return key in self._live or key in self._ended

    def get(self, key: AttemptKey) -> Kept | None:
        """The one that lives under `key`."""
        return self._live.get(key)

    def sent_by(self, router: bytes) -> list[Kept]:
        """Those that live and came from `router`."""
        return [attempt for attempt in self if attempt.route.sender == router]

    def begin(self, attempt: Kept) -> None:
        self._live[attempt.key] = attempt

    def end(self, attempt: Kept) -> None:
        del self._live[attempt.key]
        self._ended.add(attempt.key)

    def rule_out(self, key: AttemptKey) -> None:
        """Should a command for this attempt still come, nobody waits for what it asks for."""
        self._ended.add(key)
