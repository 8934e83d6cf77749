"""The staging slots of a decode worker: each is credit for one frame. Pure.

    FREE ──grant──▶ GRANTED ──header accepted──▶ LANDING ──payload here──▶ SCATTERING ──▶ FREE

A frame lands in its slot where it cannot land in its pages, since these have another layout.
A granted slot whose hand-off has ended stays out of use until the sender says that no frame will
follow, or its connection is gone: what is on the wire cannot be recalled.
"""

from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from pagewire.engine.page_pool import IntegrityError
from pagewire.worker.identity import AttemptKey


class SlotState(Enum):
    FREE = auto()
    GRANTED = auto()
    LANDING = auto()
    SCATTERING = auto()


class SlotCredit(NamedTuple):
    """One slot, as it was when it was granted."""

    slot: int
    generation: int


class SlotHolder(NamedTuple):
    """Who may write a slot: a hand-off and the worker that sends it."""

    key: AttemptKey
    peer: bytes


@dataclass(slots=True)
class _Slot:
    state: SlotState = SlotState.FREE
    generation: int = 0
    holder: SlotHolder | None = None


class SlotPool:
    """Grants slots to hand-offs and takes them back; each use of a slot has its own generation."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; a decode worker needs at least 1")
        self._slots = [_Slot() for _ in range(num_slots)]
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: Counter[SlotHolder] = Counter()  # slots per holder

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_held(self, holder: SlotHolder) -> int:
        """Slots that are granted to `holder` and not free again."""
        return self._held[holder]

    def grant(self, holder: SlotHolder) -> SlotCredit:
        """Credit for one frame. Raises IndexError when no slot is free."""
        index = self._free.pop()
        slot = self._slots[index]
        slot.state = SlotState.GRANTED
        slot.holder = holder
        self._held[holder] += 1
        return SlotCredit(index, slot.generation)

    def begin_landing(self, credit: SlotCredit, holder: SlotHolder) -> bool:
        """Whether a frame of `holder` may be written into the slot now; if so, it is."""
        return self._advance(credit, holder, SlotState.GRANTED, SlotState.LANDING)

    def begin_scatter(self, credit: SlotCredit, holder: SlotHolder) -> bool:
        """Whether this very frame was landing; if so, its bytes are complete now."""
        return self._advance(credit, holder, SlotState.LANDING, SlotState.SCATTERING)

    def free(self, index: int) -> None:
        """The frame in a slot is dealt with."""
        slot = self._slots[index]
        if slot.state is not SlotState.SCATTERING or slot.holder is None:
            raise IntegrityError(f"slot {index} was freed while {slot.state.name}")
        self._free_slot(index)

    def reclaim_granted(self, holder: SlotHolder) -> None:
        """No frame of `holder` will follow: its unused credit is void."""
        for index, slot in enumerate(self._slots):
            if slot.holder == holder and slot.state is SlotState.GRANTED:
                self._free_slot(index)

    def reclaim_peer(self, peer: bytes) -> list[int]:
        """The connection to `peer` is gone, and with it everything that could write its slots.

        Returns the slots whose frames were landing.
        """
        states = (SlotState.GRANTED, SlotState.LANDING)
        reclaimed = [
            (index, slot.state)
            for index, slot in enumerate(self._slots)
            if slot.holder is not None and slot.holder.peer == peer and slot.state in states
        ]
        for index, _ in reclaimed:
            self._free_slot(index)
        return [index for index, state in reclaimed if state is SlotState.LANDING]

    def holders_awaited(self) -> list[SlotHolder]:
        """Who may still write a slot, granted or landing; each once, in order of their slots."""
        states = (SlotState.GRANTED, SlotState.LANDING)
        holders = [slot.holder for slot in self._slots if slot.holder and slot.state in states]
        return list(dict.fromkeys(holders))

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the books balance."""
        free = {index for index, slot in enumerate(self._slots) if slot.state is SlotState.FREE}
        if free != set(self._free) or len(self._free) != len(free):
            raise IntegrityError("the list of free slots does not match their states")
        held = Counter(slot.holder for slot in self._slots if slot.holder is not None)
        if held != +self._held:
            raise IntegrityError("the count of held slots does not match their holders")

    def _advance(
        self, credit: SlotCredit, holder: SlotHolder, before: SlotState, after: SlotState
    ) -> bool:
        """Move a slot on, if it is what a message from outside believes it to be."""
        if not 0 <= credit.slot < len(self._slots):
            return False
        slot = self._slots[credit.slot]
        if (slot.state, slot.generation, slot.holder) != (before, credit.generation, holder):
            return False
        slot.state = after
        return True

    def _free_slot(self, index: int) -> None:
        slot = self._slots[index]
        assert slot.holder is not None, "a free slot has no holder"
        self._held[slot.holder] -= 1
        if not self._held[slot.holder]:
            del self._held[slot.holder]
        self._slots[index] = _Slot(generation=slot.generation + 1)
        self._free.append(index)
