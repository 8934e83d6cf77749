"""How long senders take to say that nothing of a hand-off that was given up will follow. Pure."""

from collections.abc import Iterable

from pagewire.decode_worker.slots import SlotHolder


class Closing:
    """Watches those whose hand-off has ended here and who may still write the slots they hold."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: dict[SlotHolder, float] = {}

    def overdue(self, holders: Iterable[SlotHolder], now: float, standstill: float) -> list[bytes]:
        """The workers that have left a hand-off open for too long, each once.

        `holders` are all whose hand-off has ended, and `standstill` is how much of the time since
        the last look nobody could have reached this process.
        """
        self._since = {
            holder: min(self._since.get(holder, now) + standstill, now) for holder in holders
        }
        peers = (
            holder.peer for holder, since in self._since.items() if now - since > self._limit_s
        )
        return list(dict.fromkeys(peers))
