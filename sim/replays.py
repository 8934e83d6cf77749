"""What somebody gains who has recorded a hand-off and plays it back to the decode worker: nothing.

Everything that a prefill worker sent comes again when it may not count any more: as it was, and
changed to name whatever is under way then.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from pagewire.decode_worker.core import DecodeCore
from pagewire.kv_transfer.messages import Frame, Message, Open, Refused, decode
from pagewire.sim.decode import SimDecodeWorker
from pagewire.sim.kv_memory import LAYOUT
from pagewire.sim.transport import SimHandler
from pagewire.sim.violation import require
from pagewire.sim.worker_group import Handoff, WorkerGroup
from pagewire.worker.effects import Effect, Send

_MOMENT_S = 0.0005
_HANG_S = 10.0


@dataclass(slots=True, kw_only=True)
class ReplayFigures:
    """Messages by situation."""

    num_replayed: Counter[str] = field(default_factory=Counter)
    num_accepted: Counter[str] = field(default_factory=Counter)


class Recorder(SimHandler):
    """Listens to what a decode worker is sent."""

    def __init__(self, worker: SimDecodeWorker) -> None:
        self.messages: list[Message] = []
        self._worker = worker
        worker.transport.handler = self

    def place(self, peer: bytes, header: bytes, length: int) -> int | None:
        self.messages.append(decode(header))
        return self._worker.place(peer, header, length)

    def land(self, slot: int, payload: bytes) -> None:
        self._worker.land(slot, payload)

    def deliver(self, peer: bytes, header: bytes) -> None:
        message = decode(header)
        if not isinstance(message, Frame):  # `place` has seen these
            self.messages.append(message)
        self._worker.deliver(peer, header)

    def lost(self, peer: bytes) -> None:
        self._worker.lost(peer)


class Replays:
    """Records hand-offs between two workers and plays them back."""

    def __init__(self, seed: int) -> None:
        self.figures = ReplayFigures()
        self._group = WorkerGroup(seed)
        self._recorder = Recorder(self._group.decode)

    def run(self, num_handoffs: int) -> ReplayFigures:
        """Record so many hand-offs, and play each back in every situation.

        Raises InvariantViolation when that disturbs the hand-off that is under way meanwhile.
        """
        for _ in range(num_handoffs):
            self._run_round()
        return self.figures

    def _run_round(self) -> None:
        group = self._group
        group.hand_off()
        group.settle()
        recorded, self._recorder.messages = self._recorder.messages, []
        (prefill,) = (worker.incarnation for worker in group.prefills)
        self._play("after completion", prefill, recorded)

        current = group.hand_off()
        self._run_until(lambda: current.heard == "attached")
        tickets = [message for message in recorded if isinstance(message, Open)]
        self._play("ticket of another hand-off", prefill, _renamed(tickets, current))
        self._run_until(lambda: any(isinstance(item, Frame) for item in self._recorder.messages))
        self._play("after page reuse", prefill, recorded)
        self._play_from_elsewhere([*recorded, *self._recorder.messages])
        group.settle()
        require(current.has_finished, f"{current.request_id} did not survive the replays")

        recorded += self._recorder.messages
        group.restart_decode()
        self._recorder = Recorder(group.decode)
        self._play("after a restart", prefill, recorded)
        successor = group.decode.incarnation
        self._play("after a restart", prefill, _readdressed(recorded, receiver=successor))

    def _play_from_elsewhere(self, messages: list[Message]) -> None:
        """Another worker has them, those of the hand-off that is under way among them."""
        thief = self._group.random.randbytes(16)
        self._play("from another worker", thief, messages)
        self._play("from another worker", thief, _readdressed(messages, sender=thief))

    def _play(self, situation: str, peer: bytes, messages: Iterable[Message]) -> None:
        core = self._group.decode.core
        for message in messages:
            self.figures.num_replayed[situation] += 1
            self.figures.num_accepted[situation] += _is_accepted(
                core, peer, message, self._group.environment.now
            )
        core.check_integrity()

    def _run_until(self, condition: Callable[[], bool]) -> None:
        horizon = self._group.environment.now + _HANG_S
        while not condition():
            require(self._group.environment.now < horizon, "a hand-off does not begin")
            self._group.run_for(_MOMENT_S)


def _is_accepted(core: DecodeCore, peer: bytes, message: Message, now: float) -> bool:
    """Whether a message got anything but a refusal: a place for its bytes, or an answer."""
    effects: list[Effect] = []
    if isinstance(message, Frame):
        place, effects = core.place(peer, message, message.part.num_bytes(LAYOUT))
        if place is not None:
            return True
    effects += core.on_message(peer, message, now)
    return any(
        not (isinstance(effect, Send) and isinstance(effect.message, Refused)) for effect in effects
    )


def _renamed(messages: Iterable[Message], handoff: Handoff) -> list[Message]:
    return [
        replace(message, id=replace(message.id, request_id=handoff.request_id))
        for message in messages
    ]


def _readdressed(
    messages: Iterable[Message], *, sender: bytes | None = None, receiver: bytes | None = None
) -> list[Message]:
    return [
        replace(
            message,
            id=replace(
                message.id,
                sender=sender or message.id.sender,
                receiver=receiver or message.id.receiver,
            ),
        )
        for message in messages
    ]
