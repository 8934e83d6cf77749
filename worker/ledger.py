"""Which attempts a worker has finished with, so that late or repeated commands change nothing."""

from pagewire.worker.identity import AttemptKey

_CAPACITY = 4096


class EndedAttempts:
    """Remembers the attempts that ended last, in bounded memory."""

    def __init__(self) -> None:
        self._keys: dict[AttemptKey, None] = {}  # in order of ending

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._keys

    def add(self, key: AttemptKey) -> None:
        self._keys[key] = None
        if len(self._keys) > _CAPACITY:
            del self._keys[next(iter(self._keys))]
