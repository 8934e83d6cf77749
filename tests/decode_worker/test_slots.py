"""SlotPool against a model of it that is too simple to be wrong."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagewire.decode_worker.slots import SlotCredit, SlotHolder, SlotPool, SlotState
from pagewire.engine.page_pool import IntegrityError
from pagewire.worker.identity import AttemptKey

NUM_SLOTS = 4
HOLDERS = [
    SlotHolder(AttemptKey(request, attempt), peer)
    for request, attempt, peer in (
        ("a", 1, b"p" * 16),
        ("a", 2, b"p" * 16),
        ("b", 1, b"p" * 16),
        ("b", 1, b"q" * 16),
    )
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One use of a slot, from its grant on."""

    credit: SlotCredit
    holder: SlotHolder
    state: SlotState


class SlotMachine(RuleBasedStateMachine):
    """Random calls on a pool; the model is a list of uses, and of those that are over."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(NUM_SLOTS)
        self.uses: list[Use] = []
        self.over: list[Use] = []

    @precondition(lambda self: len(self.uses) < NUM_SLOTS)
    @rule(holder=st.sampled_from(HOLDERS))
    def grant(self, holder: SlotHolder) -> None:
        credit = self.pool.grant(holder)
        assert credit not in [use.credit for use in self.uses + self.over]
        self.uses.append(Use(credit=credit, holder=holder, state=SlotState.GRANTED))

    @precondition(lambda self: len(self.uses) == NUM_SLOTS)
    @rule()
    def grant_without_a_free_slot(self) -> None:
        with pytest.raises(IndexError):
            self.pool.grant(HOLDERS[0])

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        use = data.draw(st.sampled_from(self.uses))
        is_possible = use.state is SlotState.GRANTED
        assert self.pool.begin_landing(use.credit, use.holder) is is_possible
        if is_possible:
            self._replace(use, SlotState.LANDING)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def scatter(self, data: st.DataObject) -> None:
        use = data.draw(st.sampled_from(self.uses))
        is_possible = use.state is SlotState.LANDING
        assert self.pool.begin_scatter(use.credit, use.holder) is is_possible
        if is_possible:
            self._replace(use, SlotState.SCATTERING)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        use = data.draw(st.sampled_from(self.uses))
        if use.state is not SlotState.SCATTERING:
            with pytest.raises(IntegrityError, match=use.state.name):
                self.pool.free(use.credit.slot)
            return
        self.pool.free(use.credit.slot)
        self._end([use])

    @rule(holder=st.sampled_from(HOLDERS))
    def reclaim_granted(self, holder: SlotHolder) -> None:
        self.pool.reclaim_granted(holder)
        self._end(
            [use for use in self.uses if use.holder == holder and use.state is SlotState.GRANTED]
        )

    @rule(peer=st.sampled_from([b"p" * 16, b"q" * 16]))
    def reclaim_peer(self, peer: bytes) -> None:
        self.pool.reclaim_peer(peer)
        self._end(
            [
                use
                for use in self.uses
                if use.holder.peer == peer and use.state is not SlotState.SCATTERING
            ]
        )

    @precondition(lambda self: self.over)
    @rule(data=st.data())
    def use_what_is_over(self, data: st.DataObject) -> None:
        use = data.draw(st.sampled_from(self.over))
        assert not self.pool.begin_landing(use.credit, use.holder)
        assert not self.pool.begin_scatter(use.credit, use.holder)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def use_what_is_anothers(self, data: st.DataObject) -> None:
        use = data.draw(st.sampled_from(self.uses))
        for holder in HOLDERS:
            if holder != use.holder:
                assert not self.pool.begin_landing(use.credit, holder)
                assert not self.pool.begin_scatter(use.credit, holder)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free == NUM_SLOTS - len(self.uses)
        for holder in HOLDERS:
            held = sum(use.holder == holder for use in self.uses)
            assert self.pool.num_held(holder) == held
        awaited = {use.holder for use in self.uses if use.state is not SlotState.SCATTERING}
        assert sorted(self.pool.holders_awaited()) == sorted(awaited)

    def _replace(self, use: Use, state: SlotState) -> None:
        self.uses[self.uses.index(use)] = replace(use, state=state)

    def _end(self, uses: list[Use]) -> None:
        self.over += uses
        self.uses = [use for use in self.uses if use not in uses]


SlotMachine.TestCase.settings = settings(max_examples=150, deadline=None)
TestSlotPool = SlotMachine.TestCase


def test_a_pool_has_slots() -> None:
    with pytest.raises(ValueError, match="num_slots is 0"):
        SlotPool(0)


@pytest.mark.parametrize("slot", [NUM_SLOTS, 2**32 - 1])
def test_a_slot_that_does_not_exist_is_nobodys(slot: int) -> None:
    pool = SlotPool(NUM_SLOTS)
    assert not pool.begin_landing(SlotCredit(slot, 0), HOLDERS[0])
    assert not pool.begin_scatter(SlotCredit(slot, 0), HOLDERS[0])
