"""Which transport one pair of workers uses: the best whose circuit lets it. Pure.

A transport that fails is given up for a time and the next one used instead. Where there is no
other, it is only tried less often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.circuit import (
    Circuit,
    CircuitEvent,
    CircuitLimits,
    CircuitState,
    advance,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """How to connect."""

    kinds: tuple[str, ...]  # in this order, until one succeeds
    wait_s: float  # before the first


class Breaker:
    """The circuits of one pair. `kinds` are always its transports, best first, at least one."""

    def __init__(self, limits: CircuitLimits) -> None:
        self._limits = limits
        self._circuits: dict[str, Circuit] = {}

    @property
    def circuits(self) -> Mapping[str, Circuit]:
        """By kind; of those that something was reported of."""
        return self._circuits

    def report(self, kind: str, event: CircuitEvent, now: float) -> bool:
        """Take note of `event`; whether transport `kind` is given up because of it."""
        before = self._circuit(kind)
        after = advance(before, event, now, self._limits)
        self._circuits[kind] = after
        return after.num_trips != before.num_trips

    def attempts(self, kinds: Sequence[str], now: float) -> Attempts:
        """Over which transports a connection is to be made."""
        usable = tuple(kind for kind in kinds if self._may_use(kind, now))
        if usable:
            return Attempts(kinds=usable, wait_s=0.0)
        ready_at = {kind: self._circuit(kind).backed_off_at(self._limits) for kind in kinds}
        order = tuple(sorted(kinds, key=lambda kind: ready_at[kind]))
        return Attempts(kinds=order, wait_s=max(0.0, ready_at[order[0]] - now))

    def better(self, kind: str, kinds: Sequence[str], now: float) -> str | None:
        """A transport before `kind` that may be tried, while that one is in use."""
        before = kinds[: kinds.index(kind)]
        return next((item for item in before if self._may_use(item, now)), None)

    def may_forget(self, now: float) -> bool:
        """Whether all that is known is too old to matter."""
        age_s = self._limits.window_s + self._limits.max_cooldown_s
        return all(
            now - max(circuit.since, *circuit.losses, float("-inf")) > age_s
            for circuit in self._circuits.values()
        )

    def _circuit(self, kind: str) -> Circuit:
        return self._circuits.get(kind, Circuit())

    def _may_use(self, kind: str, now: float) -> bool:
        circuit = self._circuit(kind)
        return circuit.state is CircuitState.CLOSED or now >= circuit.cooled_down_at(self._limits)
