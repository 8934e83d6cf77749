"""Hand-offs to one decode worker that are given up at random moments, at either end first.

The links between the workers repeat messages, let them overtake each other, change payloads and
break now and then. Nothing of it may cost a page or a slot, or change a token of a hand-off that
nobody gave up.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from pagewire.sim.costs import Costs, Range
from pagewire.sim.faults import Faults, MessageFaults
from pagewire.sim.invariants import AnyWorker
from pagewire.sim.worker_group import Handoff, WorkerGroup

_FAULTS = Faults(peer_messages=MessageFaults(repeat=0.05, reorder=0.02, corrupt=0.01))
_COSTS = Costs(wire=Range(low=0.0, high=0.1))  # so that many aborts find frames that land
_NUM_PREFILL = 3  # so that a frame of one can land while pages of another change hands
_WAVE = 16  # hand-offs at once
_SPREAD_S = 0.3  # in which those of a wave begin
_PATIENCE_S = 1.0  # within which one is given up; most have ended by then
_ABORT_PROBABILITY = 0.8
_LOSS_PROBABILITY = 0.1  # that the connection breaks, for each wave


@dataclass(slots=True, kw_only=True)
class AbortFigures:
    """What a storm has done, and what it has cost."""

    num_aborted: int = 0
    heard: Counter[str] = field(default_factory=Counter)  # the last event before each abort
    num_finished: int = 0  # beside them, every token right
    pages_lost: int = 0  # of all workers, once all is over
    slots_lost: int = 0


class AbortStorm:
    """One group of workers, so that what is lost stays lost."""

    def __init__(self, seed: int) -> None:
        self.figures = AbortFigures()
        self._group = WorkerGroup(seed, num_prefill=_NUM_PREFILL, faults=_FAULTS, costs=_COSTS)

    def run(self, num_aborts: int) -> AbortFigures:
        """Give up so many hand-offs, or a few more.

        Raises InvariantViolation for a wrong token or a hand-off that never ends, IntegrityError
        when the books of a worker do not balance after an event.
        """
        while self.figures.num_aborted < num_aborts:
            self._run_wave()
        self._count_losses()
        return self.figures

    def _run_wave(self) -> None:
        group, random = self._group, self._group.random
        wave: list[Handoff] = []
        for _ in range(_WAVE):
            group.environment.timeline.after(
                random.uniform(0.0, _SPREAD_S), lambda: wave.append(self._begin())
            )
        if random.random() < _LOSS_PROBABILITY:
            group.environment.timeline.after(random.uniform(0.0, _PATIENCE_S), self._break_link)
        group.run_for(_SPREAD_S + _PATIENCE_S)
        group.settle()
        self.figures.num_aborted += sum(handoff.is_aborted for handoff in wave)
        self.figures.num_finished += sum(handoff.has_finished for handoff in wave)

    def _begin(self) -> Handoff:
        group, random = self._group, self._group.random
        handoff = group.hand_off()
        if random.random() < _ABORT_PROBABILITY:
            for worker in (handoff.prefill, group.decode):
                patience = random.uniform(0.0, _PATIENCE_S)
                group.environment.timeline.after(patience, partial(self._abort, handoff, worker))
        return handoff

    def _abort(self, handoff: Handoff, worker: AnyWorker) -> None:
        if not handoff.is_aborted:
            self.figures.heard[handoff.heard] += 1
        self._group.abort(handoff, worker)

    def _break_link(self) -> None:
        for connection in self._group.fabric.connections():
            connection.lose()

    def _count_losses(self) -> None:
        for worker in self._group.workers:
            pool = worker.core.pool
            self.figures.pages_lost += pool.num_pages - pool.num_available
        slots = self._group.decode.core.slots
        self.figures.slots_lost += slots.num_slots - slots.num_free
