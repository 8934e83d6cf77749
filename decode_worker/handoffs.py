"""The hand-offs that come to a decode worker: (state, event, now) → effects. Pure.

An attempt that a router has announced waits for its prefill worker, then for room, then for its
frames; when all of it is here it joins the running batch. Each hand-off has a `Receiver`, which
checks it; here is what they share: room, staging slots, and the pages that frames are written into.
"""

from pagewire.decode_worker.admission import Admission
from pagewire.decode_worker.closing import Closing
from pagewire.decode_worker.credit import grant_slots
from pagewire.decode_worker.first_tokens import take_logprobs
from pagewire.decode_worker.frame_place import FramePlace
from pagewire.decode_worker.page_owner import grow
from pagewire.decode_worker.receiver import ReceiverState
from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.running_batch import RunningBatch
from pagewire.decode_worker.slots import SlotCredit, SlotHolder, SlotPool
from pagewire.decode_worker.written_pages import WrittenPages
from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import (
    Accepted,
    Closed,
    Committed,
    Frame,
    FrameAck,
    HandoffId,
    Message,
    Open,
    Refused,
    RefuseReason,
    Renew,
    Seal,
)
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.attempts import Attempts
from pagewire.worker.effects import Disconnect, Effect, Emit, Scatter, Send, Verify
from pagewire.worker.events import failed
from pagewire.worker.identity import AttemptKey, reply_route

_NO_ROOM = (
    pb.FAILURE_CODE_FULL,
    "the decode worker is full, and as many hand-offs as may wait there for room",
)
_REJECTED = (
    pb.FAILURE_CODE_INTEGRITY,
    "the decode worker rejected a hand-off that failed its checks",
)


class Handoffs:
    """All hand-offs of a decode worker; what is complete goes to `batch`."""

    def __init__(
        self,
        *,
        attempts: Attempts[DecodeRequest],
        admission: Admission,
        batch: RunningBatch,
        pool: PagePool,
        cache: PrefixCache,
        slots: SlotPool,
        layout: KVLayout,
        vocab_size: int,
        slot_bytes: int,
        max_slots_per_handoff: int,
        closing_s: float,
        renew_s: float,
    ) -> None:
        """Arguments: see DecodeCore."""
        self._attempts = attempts
        self._admission = admission
        self._batch = batch
        self._pool = pool
        self._cache = cache
        self._slots = slots
        self._layout = layout
        self._vocab_size = vocab_size
        self._slot_bytes = slot_bytes
        self._max_slots_per_handoff = max_slots_per_handoff
        self._renew_s = renew_s
        self._closing = Closing(closing_s)
        self._receiving: dict[AttemptKey, DecodeRequest] = {}  # those that have room
        self._written = WrittenPages(pool)
        self.num_dropped = 0  # messages

    @property
    def num_waiting(self) -> int:
        """Those that wait for room."""
        return len(self._admission.waiting)

    @property
    def num_receiving(self) -> int:
        return len(self._receiving)

    # --- From the router --------------------------------------------------------------------------

    def expect(self, request: DecodeRequest, held: AttemptKey, now: float) -> list[Effect]:
        """A prefill worker will open the hand-off of `request`.

        `held` is the earlier attempt whose Reservation it takes over, if that is still there.
        """
        effects = self._take_over(request, held, now)
        self._attempts.begin(request)  # only now: nobody takes over from itself
        return effects

    def _take_over(self, request: DecodeRequest, key: AttemptKey, now: float) -> list[Effect]:
        """Give an attempt what an earlier one was promised, whose prefill worker is lost.

        The router may know of that first: then the earlier hand-off ends here.
        """
        live = self._attempts.get(key)
        predecessor = live or self._admission.held(key)
        if predecessor is None or predecessor.route.sender != request.route.sender:
            return []
        effects = self._leave(predecessor) if live is not None else []
        self._admission.take_over(request, predecessor, now)
        return [*effects, *self.admit_waiting()]

    def drop_held(self, key: AttemptKey, router: bytes) -> list[Effect]:
        """No attempt will take over what was promised to this one of `router`."""
        held = self._admission.held(key)
        if held is None or held.route.sender != router:
            return []
        self._drop_held(held)
        return self.admit_waiting()

    def drop_all_held(self, router: bytes) -> None:
        """Nor what was promised to any that came from `router`."""
        for request in self._admission.held_for(router):
            self._drop_held(request)

    def _drop_held(self, request: DecodeRequest) -> None:
        self._admission.leave(request)
        self._admission.give_back(request)

    def end(self, request: DecodeRequest) -> list[Effect]:
        """Forget a request, however far it has come, and release what it holds.

        What is in use becomes quarantined.
        """
        effects = self._leave(request)
        self._admission.give_back(request)
        return [*effects, *self.admit_waiting()]

    # --- From the prefill worker ------------------------------------------------------------------

    def on_message(self, message: Message, now: float) -> list[Effect]:
        """A message that names its sender truly; a Frame's payload lies in its slot or pages."""
        match message:
            case Open():
                return self._on_open(message, now)
            case Frame():
                return self._on_frame(message)
            case Seal():
                return self._on_seal(message, now)
            case Closed():
                return self._on_closed(message)
            case _:
                self.num_dropped += 1
                return []

    def place(
        self, peer: bytes, frame: Frame, length: int
    ) -> tuple[FramePlace | None, list[Effect]]:
        """Where the payload of `frame` may be written; None to discard it."""
        request = self._addressee(frame.id)
        if (
            request is None
            or frame.id.sender != peer
            or request.receiver.state is not ReceiverState.RECEIVING
            or request.receiver.is_repeated(frame)
        ):
            self.num_dropped += 1
            return None, []
        if length > self._slot_bytes:
            return None, self._fail(request, RefuseReason.LAYOUT)
        if not request.receiver.agrees(frame, length):
            return None, self._fail(request, RefuseReason.INTEGRITY)
        if not self._slots.begin_landing(_credit(frame), request.holder):
            self.num_dropped += 1
            return None, []
        request.receiver.on_landing(frame)
        grow(request, self._layout.num_pages(request.num_prompt_tokens), self._pool)
        if not request.receiver.lands_in_pages:
            return FramePlace(slot=frame.slot, page_table=None), []
        self._written.pin(frame.slot, request.pages_of(frame))
        return FramePlace(slot=frame.slot, page_table=tuple(request.pages)), []

    def on_scattered(self, frame: Frame, is_sound: bool, now: float) -> list[Effect]:
        """A Scatter or Verify is done: the bytes of `frame` are in pages, if they were sound."""
        self._free_slot(frame.slot)
        request = self._addressee(frame.id)
        if request is None:  # its pages were quarantined until now
            return self.admit_waiting()
        if not is_sound:
            return self._fail(request, RefuseReason.INTEGRITY)
        fault = request.receiver.on_scattered(frame)
        if fault is not None:
            return self._fail(request, fault)
        ack = Send(message=FrameAck(id=request.receiver.id, seq=frame.seq))
        return [ack, *self._start_if_ready(request, now), *self._grant_slots()]

    def on_peer_lost(self, peer: bytes, now: float) -> list[Effect]:
        """A prefill worker is gone, or cannot be reached; nothing writes its slots any more.

        What its hand-offs were promised is held for the attempts that follow.
        """
        self._written.unpin(self._slots.reclaim_peer(peer))
        effects: list[Effect] = []
        for request in self._attempts:
            receiver = request.receiver
            if receiver.id.receiver == peer and receiver.is_open and receiver.needs_sender:
                self._cache_received(request)
                receiver.close()  # first: there is nobody to be refused
                effects += self._leave(request)
                self._admission.hold(request, now)
                effects.append(
                    failed(
                        request.route,
                        "the connection to the prefill worker was lost during the hand-off",
                        pb.FAILURE_CODE_PEER_LOST,
                    )
                )
        return [*effects, *self.admit_waiting()]

    def _on_open(self, message: Open, now: float) -> list[Effect]:
        request = self._addressee(message.id)
        if request is None:
            refusal = Refused(id=message.id.reply(), reason=RefuseReason.UNKNOWN_TICKET)
            return [Send(message=refusal)]
        if request.receiver.state is not ReceiverState.EXPECTED:
            self.num_dropped += 1
            return []
        reason = request.receiver.on_open(message)
        if reason is RefuseReason.UNKNOWN_TICKET:
            return [Send(message=Refused(id=message.id.reply(), reason=reason))]
        if reason is not None:
            return self._fail(request, reason)
        self._admission.wait(request, now - message.age_ms / 1000)
        effects = self.admit_waiting()
        refused = self._admission.refused()
        return [*effects, *(self._fail(refused, RefuseReason.FULL) if refused else [])]

    def _on_frame(self, frame: Frame) -> list[Effect]:
        holder = SlotHolder(AttemptKey.of(frame.id), frame.id.sender)
        if not self._slots.begin_scatter(_credit(frame), holder):
            self.num_dropped += 1
            return []
        request = self._addressee(frame.id)
        if request is None:  # aborted while the frame was landing
            self._free_slot(frame.slot)
            return self.admit_waiting()
        request.receiver.on_landed(frame)
        if frame.slot in self._written:
            return [Verify(frame=frame)]
        self._written.pin(frame.slot, request.pages_of(frame))
        source = request.receiver.source
        return [Scatter(frame=frame, source=source, page_table=tuple(request.pages))]

    def _on_seal(self, seal: Seal, now: float) -> list[Effect]:
        request = self._addressee(seal.id)
        if request is None or request.receiver.state is not ReceiverState.RECEIVING:
            self.num_dropped += 1
            return []
        if not take_logprobs(request, seal, self._vocab_size):
            return self._fail(request, RefuseReason.INTEGRITY)
        fault = request.receiver.on_seal(seal)
        if fault is not None:
            return self._fail(request, fault)
        request.sealed_at = now
        return self._start_if_ready(request, now)

    def _on_closed(self, message: Closed) -> list[Effect]:
        self._slots.reclaim_granted(SlotHolder(AttemptKey.of(message.id), message.id.sender))
        request = self._addressee(message.id)
        if request is None or not (request.receiver.is_open and request.receiver.needs_sender):
            return self._grant_slots()
        self._cache_received(request)
        request.receiver.close()
        text = "the prefill worker gave the hand-off up"
        failure = failed(request.route, text, pb.FAILURE_CODE_PEER_LOST)
        return [*self.end(request), failure]

    def _addressee(self, id: HandoffId) -> DecodeRequest | None:
        request = self._attempts.get(AttemptKey.of(id))
        if request is None or id != request.receiver.id.reply():
            return None
        return request

    # --- Capacity ---------------------------------------------------------------------------------

    def admit_waiting(self) -> list[Effect]:
        """Let those begin for whom there is room."""
        effects: list[Effect] = []
        for request, num_hit_pages in self._admission.admit():
            self._receiving[request.key] = request
            accepted = Accepted(id=request.receiver.id, num_hit_pages=num_hit_pages)
            effects.append(Send(message=accepted))
        return [*effects, *self._grant_slots()]

    def _grant_slots(self) -> list[Effect]:
        grants = grant_slots(
            self._slots, self._receiving.values(), max_per_handoff=self._max_slots_per_handoff
        )
        return [Send(message=grant) for grant in grants]

    def _free_slot(self, slot: int) -> None:
        """The frame in `slot` is dealt with; nothing writes its pages any more."""
        self._written.unpin([slot])
        self._slots.free(slot)

    # --- How a hand-off ends ----------------------------------------------------------------------

    def _start_if_ready(self, request: DecodeRequest, now: float) -> list[Effect]:
        """Put a complete hand-off into the running batch and let the sender free its pages."""
        receiver = request.receiver
        if receiver.state is not ReceiverState.READY or receiver.seal is None:
            return []
        del self._receiving[request.key]
        self._slots.reclaim_granted(request.holder)
        ready = pb.Ready(times=pb.TimeParts(scatter_s=now - request.sealed_at))
        event = pb.WorkerEvent(route=reply_route(request.route), ready=ready)
        return [
            Send(message=Committed(id=receiver.id)),
            Emit(event=event),
            *self._batch.start(request, receiver.seal.first_tokens, now),
            *self.admit_waiting(),
        ]

    def _fail(self, request: DecodeRequest, reason: RefuseReason) -> list[Effect]:
        """What was offered cannot be used: tell the sender why, and the router."""
        request.receiver.close()
        code, text = _NO_ROOM if reason is RefuseReason.FULL else _REJECTED
        return [
            Send(message=Refused(id=request.receiver.id, reason=reason)),
            failed(request.route, text, code),
            *self.end(request),
        ]

    def _leave(self, request: DecodeRequest) -> list[Effect]:
        """Forget a request, but not what its hand-off was promised and has brought.

        Slots that the sender may still write to stay out of use until it answers with Closed.
        """
        self._batch.end(request)
        self._receiving.pop(request.key, None)
        self._admission.leave(request)
        self._cache_received(request)
        effects: list[Effect] = []
        if request.receiver.is_open:
            refusal = Refused(id=request.receiver.id, reason=RefuseReason.ABORTED)
            effects.append(Send(message=refusal))
        request.receiver.close()
        return effects

    def _cache_received(self, request: DecodeRequest) -> None:
        """A hand-off ends before it is complete: whoever tries again need not send what is here."""
        if request.receiver.state is ReceiverState.RECEIVING:
            num_pages = request.receiver.num_received_tokens // self._layout.page_size
            keys = request.page_keys[:num_pages]
            self._cache.register(keys, request.pages[: len(keys)])

    # --- Time -------------------------------------------------------------------------------------

    def tick(self, now: float, standstill: float) -> list[Effect]:
        """Renew the hand-offs under way, and give up connections whose worker leaves open what was
        refused long ago.

        Slots are not freed by a time-out: the end of the connection frees them. In the last
        `standstill` seconds nobody could have reached this process.
        """
        self._admission.forgive(standstill, now)
        self._admission.expire(now)
        ended = [
            holder
            for holder in self._slots.holders_awaited()
            if self._attempts.get(holder.key) is None
        ]
        overdue = self._closing.overdue(ended, now, standstill)
        return [
            *self.admit_waiting(),
            *self._renew(now),
            *(Disconnect(peer=peer) for peer in overdue),
        ]

    def _renew(self, now: float) -> list[Effect]:
        """Tell the senders that this worker waits for room, or for their frames."""
        effects: list[Effect] = []
        for request in (*self._admission.waiting, *self._receiving.values()):
            if now - request.renewed_at >= self._renew_s:
                request.renewed_at = now
                effects.append(Send(message=Renew(id=request.receiver.id)))
        return effects


def _credit(frame: Frame) -> SlotCredit:
    return SlotCredit(frame.slot, frame.slot_generation)
