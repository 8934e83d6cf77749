"""The decode worker without its network, clock and model: (state, event, now) → effects.

It reserves capacity, receives hand-offs into staging slots, runs ready sequences in one continuous
batch and tells the router their tokens. The shell (`pagewire.worker.shell`) carries the effects out
and reports back; the simulator drives the very same class.
"""

from collections.abc import Collection, Iterable

from google.protobuf.message import DecodeError

from pagewire.decode_worker.admission import Admission
from pagewire.decode_worker.attach import AttachReader
from pagewire.decode_worker.drafting import Speculation
from pagewire.decode_worker.frame_place import FramePlace
from pagewire.decode_worker.page_copies import PageCopies
from pagewire.decode_worker.receiver import ReceiverState
from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.running_step import RunningStep
from pagewire.decode_worker.scheduler import DecodeScheduler
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.decode_worker.slots import SlotCredit, SlotHolder, SlotPool
from pagewire.decode_worker.written_pages import WrittenPages
from pagewire.engine.batch import Batch, PageCopy, StepResult, TokenLogprobs
from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import (
    Accepted,
    Closed,
    Committed,
    Frame,
    FrameAck,
    Grant,
    HandoffId,
    Message,
    Open,
    Refused,
    RefuseReason,
    Renew,
    Seal,
)
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageHasher
from pagewire.worker.cache_reports import CacheReports
from pagewire.worker.effects import Disconnect, Effect, Emit, Scatter, Send, Verify
from pagewire.worker.events import failed, logprobs_message, page_counts
from pagewire.worker.identity import (
    AttemptKey,
    CommandError,
    finish_reason,
    reply_route,
)
from pagewire.worker.ledger import EndedAttempts
from pagewire.worker.orphans import OrphanedPages
from pagewire.worker.standstill import Standstill

_NO_ROOM = (
    pb.FAILURE_CODE_FULL,
    "the decode worker is full, and as many hand-offs as may wait there for room",
)
_REJECTED = (
    pb.FAILURE_CODE_INTEGRITY,
    "the decode worker rejected a hand-off that failed its checks",
)


class DecodeCore:
    """All state of a decode worker. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        *,
        incarnation: bytes,
        layout: KVLayout,
        pool: PagePool,
        slots: SlotPool,
        vocab_size: int,
        max_model_len: int,
        max_batch_size: int,
        slot_bytes: int,
        hasher: PageHasher | None = None,
        speculation: Speculation | None = None,
        max_slots_per_handoff: int = 4,
        max_waiting_handoffs: int = 16,
        closing_s: float = 5.0,
        renew_s: float = 1.0,
        lease_s: float = 10.0,
    ) -> None:
        """`closing_s` bounds the wait for the sender of a hand-off that was given up.

        `renew_s` is how often the sender of one that is under way is told that it is, `lease_s` how
        long the Reservation of one that has lost its sender is held for another attempt. While
        `max_waiting_handoffs` wait for room, those that come are refused.

        Without a `hasher` nothing is cached, without `speculation` nothing is drafted.
        """
        self.incarnation = incarnation
        self.layout = layout
        self.pool = pool
        self.cache = PrefixCache(pool)
        self._reports = CacheReports(self.cache, incarnation)
        self._hasher = hasher
        self.slots = slots
        self._attach_reader = AttachReader(
            layout=layout,
            num_pages=pool.num_pages,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            hasher=hasher,
            speculation=speculation,
        )
        self._vocab_size = vocab_size
        self._slot_bytes = slot_bytes
        self._speculation = speculation
        self._max_slots_per_handoff = max_slots_per_handoff
        self._closing_s = closing_s
        self._renew_s = renew_s
        self._closing_since: dict[SlotHolder, float] = {}  # ended, may still write their slots
        self._scheduler = DecodeScheduler(max_batch_size)
        self._requests: dict[AttemptKey, DecodeRequest] = {}
        self._admission = Admission(
            pool=pool,
            cache=self.cache,
            page_size=layout.page_size,
            max_waiting=max_waiting_handoffs,
            lease_s=lease_s,
        )
        self._receiving: dict[AttemptKey, DecodeRequest] = {}
        self._copies = PageCopies(pool)
        self._steps: list[RunningStep] = []  # the one that runs now, and the one behind it
        self._written = WrittenPages(pool)
        self._ended = EndedAttempts()
        self._standstill = Standstill()
        self._num_generated_tokens = 0
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0
        self._num_dropped = 0

    # --- From the router --------------------------------------------------------------------------

    def on_command(self, command: pb.WorkerCommand, now: float) -> list[Effect]:
        key = AttemptKey.of(command.route)
        if command.route.receiver != self.incarnation:
            self._num_dropped += 1
            return []
        match command.WhichOneof("body"):
            case "attach":
                return self._on_attach(key, command, now)
            case "abort":
                return self._on_abort(key, command.route.sender)
            case "stop_choice":
                return self._on_stop_choice(key, command)
            case "kv_snapshot":
                self._reports.forget(command.route.sender)
                return []
            case body:
                return [failed(command.route, f"a decode worker takes no {body}")]

    def on_session_lost(self, router: bytes) -> list[Effect]:
        """The router is gone: so is everybody who waits for its requests."""
        self._reports.forget(router)
        for request in self._admission.held_for(router):
            self._drop_held(request)
        effects = [
            effect
            for request in list(self._requests.values())
            if request.route.sender == router
            for effect in self._end(request)
        ]
        return [*effects, *self._admit_waiting()]

    def _on_attach(self, key: AttemptKey, command: pb.WorkerCommand, now: float) -> list[Effect]:
        if key in self._requests or key in self._ended:
            self._num_dropped += 1
            return []
        try:
            request = self._attach_reader.read(command)
        except CommandError as error:
            self._ended.add(key)
            return [failed(command.route, str(error))]
        held = AttemptKey(key.request_id, command.attach.held_attempt)
        effects = self._take_over(request, held, now)
        self._requests[key] = request  # only now: nobody takes over from itself
        attached = pb.WorkerEvent(route=reply_route(command.route), attached=pb.Attached())
        return [*effects, Emit(event=attached)]

    def _take_over(self, request: DecodeRequest, key: AttemptKey, now: float) -> list[Effect]:
        """Give an attempt what an earlier one was promised, whose prefill worker is lost.

        The router may know of that first: then the earlier hand-off ends here.
        """
        predecessor = self._requests.get(key) or self._admission.held(key)
        if predecessor is None or predecessor.route.sender != request.route.sender:
            return []
        effects = self._leave(predecessor) if key in self._requests else []
        self._admission.take_over(request, predecessor, now)
        return [*effects, *self._admit_waiting()]

    def _on_abort(self, key: AttemptKey, router: bytes) -> list[Effect]:
        request = self._requests.get(key)
        if request is not None:
            return self._end(request) if request.route.sender == router else []
        self._ended.add(key)
        held = self._admission.held(key)
        if held is None or held.route.sender != router:
            return []
        self._drop_held(held)
        return self._admit_waiting()

    def _on_stop_choice(self, key: AttemptKey, command: pb.WorkerCommand) -> list[Effect]:
        request = self._requests.get(key)
        if request is None or request.route.sender != command.route.sender:
            return []
        return [
            effect
            for sequence in list(request.sequences)
            if sequence.choice == command.stop_choice.choice
            for effect in self._end_choice(request, sequence)
        ]

    # --- From the prefill worker ------------------------------------------------------------------

    def on_message(self, peer: bytes, message: Message, now: float) -> list[Effect]:
        """A message from the worker `peer` is complete; a Frame's payload lies in its slot."""
        if (message.id.sender, message.id.receiver) != (peer, self.incarnation):
            self._num_dropped += 1
            return []
        match message:
            case Open():
                return self._on_open(message)
            case Frame():
                return self._on_frame(message)
            case Seal():
                return self._on_seal(message, now)
            case Closed():
                return self._on_closed(message)
            case _:
                self._num_dropped += 1
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
            self._num_dropped += 1
            return None, []
        if length > self._slot_bytes:
            return None, self._fail_handoff(request, RefuseReason.LAYOUT)
        if not request.receiver.agrees(frame, length):
            return None, self._fail_handoff(request, RefuseReason.INTEGRITY)
        if not self.slots.begin_landing(_credit(frame), request.holder):
            self._num_dropped += 1
            return None, []
        request.receiver.on_landing(frame)
        self._grow(request, request.num_prompt_tokens)
        if not request.receiver.lands_in_pages:
            return FramePlace(slot=frame.slot, page_table=None), []
        self._written.pin(frame.slot, request.pages_of(frame))
        return FramePlace(slot=frame.slot, page_table=tuple(request.pages)), []

    def on_scattered(self, frame: Frame, is_sound: bool, now: float) -> list[Effect]:
        """A Scatter or Verify is done: the bytes of `frame` are in pages, if they were sound."""
        self._free_slot(frame.slot)
        request = self._addressee(frame.id)
        if request is None:  # its pages were quarantined until now
            return self._admit_waiting()
        if not is_sound:
            return self._fail_handoff(request, RefuseReason.INTEGRITY)
        fault = request.receiver.on_scattered(frame)
        if fault is not None:
            return self._fail_handoff(request, fault)
        ack = Send(message=FrameAck(id=request.receiver.id, seq=frame.seq))
        return [ack, *self._start_if_ready(request, now), *self._grant_slots()]

    def on_peer_lost(self, peer: bytes, now: float) -> list[Effect]:
        """A prefill worker is gone, or cannot be reached; nothing writes its slots any more.

        What its hand-offs were promised is held for the attempts that follow.
        """
        self._written.unpin(self.slots.reclaim_peer(peer))
        effects: list[Effect] = []
        for request in list(self._requests.values()):
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
        return [*effects, *self._admit_waiting()]

    def _on_open(self, message: Open) -> list[Effect]:
        request = self._addressee(message.id)
        if request is None:
            refusal = Refused(id=message.id.reply(), reason=RefuseReason.UNKNOWN_TICKET)
            return [Send(message=refusal)]
        if request.receiver.state is not ReceiverState.EXPECTED:
            self._num_dropped += 1
            return []
        reason = request.receiver.on_open(message)
        if reason is RefuseReason.UNKNOWN_TICKET:
            return [Send(message=Refused(id=message.id.reply(), reason=reason))]
        if reason is not None:
            return self._fail_handoff(request, reason)
        self._admission.wait(request)
        effects = self._admit_waiting()
        if self._admission.is_refused(request):
            return [*effects, *self._fail_handoff(request, RefuseReason.FULL)]
        return effects

    def _on_frame(self, frame: Frame) -> list[Effect]:
        holder = SlotHolder(AttemptKey.of(frame.id), frame.id.sender)
        if not self.slots.begin_scatter(_credit(frame), holder):
            self._num_dropped += 1
            return []
        request = self._addressee(frame.id)
        if request is None:  # aborted while the frame was landing
            self._free_slot(frame.slot)
            return self._admit_waiting()
        request.receiver.on_landed(frame)
        if frame.slot in self._written:
            return [Verify(frame=frame)]
        self._written.pin(frame.slot, request.pages_of(frame))
        source = request.receiver.source
        return [Scatter(frame=frame, source=source, page_table=tuple(request.pages))]

    def _on_seal(self, seal: Seal, now: float) -> list[Effect]:
        request = self._addressee(seal.id)
        if request is None or request.receiver.state is not ReceiverState.RECEIVING:
            self._num_dropped += 1
            return []
        if not self._is_credible(request, seal):
            return self._fail_handoff(request, RefuseReason.INTEGRITY)
        fault = request.receiver.on_seal(seal)
        if fault is not None:
            return self._fail_handoff(request, fault)
        request.sealed_at = now
        return self._start_if_ready(request, now)

    def _is_credible(self, request: DecodeRequest, seal: Seal) -> bool:
        """Whether a Seal can be one of this request; takes the logprobs of its tokens.

        It has token 0 of every choice, and not all of them are final: these need no hand-off.
        """
        tokens = seal.first_tokens
        if len(tokens) != request.num_choices or max(tokens) >= self._vocab_size:
            return False
        sampling = request.sequences[0].sampling
        num_tokens = request.sequences[0].num_resumed + 1
        if all(finish_reason(token, num_tokens, sampling) for token in tokens):
            return False
        if sampling.num_logprobs is None:
            return True
        try:
            for sequence in request.sequences:
                values = pb.TokenLogprobs.FromString(seal.first_logprobs[sequence.choice])
                sequence.logprobs = [values]
        except (IndexError, DecodeError):
            return False
        return True

    def _on_closed(self, message: Closed) -> list[Effect]:
        self.slots.reclaim_granted(SlotHolder(AttemptKey.of(message.id), message.id.sender))
        request = self._addressee(message.id)
        if request is None or not (request.receiver.is_open and request.receiver.needs_sender):
            return self._grant_slots()
        self._cache_received(request)
        request.receiver.close()
        text = "the prefill worker gave the hand-off up"
        failure = failed(request.route, text, pb.FAILURE_CODE_PEER_LOST)
        return [*self._end(request), failure]

    def _addressee(self, id: HandoffId) -> DecodeRequest | None:
        request = self._requests.get(AttemptKey.of(id))
        if request is None or id != request.receiver.id.reply():
            return None
        return request

    # --- Capacity ---------------------------------------------------------------------------------

    def _admit_waiting(self) -> list[Effect]:
        """Let those begin for whom there is room."""
        effects: list[Effect] = []
        for request, num_hit_pages in self._admission.admit():
            self._receiving[request.key] = request
            accepted = Accepted(id=request.receiver.id, num_hit_pages=num_hit_pages)
            effects.append(Send(message=accepted))
        return [*effects, *self._grant_slots()]

    def _grant_slots(self) -> list[Effect]:
        """Hand out free slots, one at a time to the hand-off that holds the fewest."""
        effects: list[Effect] = []
        while self.slots.num_free:
            candidates = [
                request
                for request in self._receiving.values()
                if request.receiver.wants_credit
                and self.slots.num_held(request.holder) < self._max_slots_per_handoff
            ]
            if not candidates:
                break
            request = min(candidates, key=lambda item: self.slots.num_held(item.holder))
            credit = self.slots.grant(request.holder)
            grant = Grant(
                id=request.receiver.id, slot=credit.slot, slot_generation=credit.generation
            )
            effects.append(Send(message=grant))
        return effects

    def _free_slot(self, slot: int) -> None:
        """The frame in `slot` is dealt with; nothing writes its pages any more."""
        self._written.unpin([slot])
        self.slots.free(slot)

    def _grow(self, owner: DecodeRequest | DecodeSequence, num_tokens: int) -> None:
        """Give its owner pages for `num_tokens` tokens, out of its Reservation."""
        missing = self.layout.num_pages(num_tokens) - len(owner.pages)
        if missing > 0:
            assert owner.reservation is not None, "who grows was reserved for"
            owner.pages += self.pool.take(owner.reservation, missing)

    def _start_if_ready(self, request: DecodeRequest, now: float) -> list[Effect]:
        """Put a complete hand-off into the running batch and let the sender free its pages."""
        receiver = request.receiver
        if receiver.state is not ReceiverState.READY or receiver.seal is None:
            return []
        del self._receiving[request.key]
        self.slots.reclaim_granted(request.holder)
        request.queued_at = now
        ready = pb.Ready(times=pb.TimeParts(scatter_s=now - request.sealed_at))
        event = pb.WorkerEvent(route=reply_route(request.route), ready=ready)
        effects: list[Effect] = [Send(message=Committed(id=receiver.id)), Emit(event=event)]
        sequences, request.sequences = request.sequences, []
        for sequence in sequences:
            sequence.append(receiver.seal.first_tokens[sequence.choice])
            token = sequence.output[0]
            reason = finish_reason(token, sequence.num_output_tokens, sequence.sampling)
            if reason:  # it never runs, while others do
                effects.append(_tokens(sequence, reason))
            else:
                request.sequences.append(sequence)
        self._fork(request)
        for sequence in request.sequences:
            self._cache_computed(sequence)
            self._scheduler.add(sequence)
        return [*effects, *(self._grant_slots() if request.sequences else self._end(request))]

    def _fork(self, request: DecodeRequest) -> None:
        """Share the prompt's pages among the sequences, copy-on-write.

        Nobody writes a full page again, so all have the same ones. The last page, when it is partly
        filled, is where each writes next: the first sequence takes it over, the others get a copy.
        """
        assert request.reservation is not None, "what is complete was reserved for"
        num_pages = self.layout.num_pages(request.num_prompt_tokens + request.max_tokens - 1)
        num_full = request.num_prompt_tokens // self.layout.page_size
        for index, sequence in enumerate(request.sequences):
            shared = request.pages[:num_full] if index else request.pages
            self.pool.retain(shared)
            sequence.reservation = self.pool.split(request.reservation, num_pages - len(shared))
            copied = request.pages[len(shared) :]
            own = self.pool.take(sequence.reservation, len(copied))
            self._copies.add(map(PageCopy, copied, own))
            sequence.pages = [*shared, *own]
        self.pool.release(request.pages)
        request.pages = []
        self.pool.cancel(request.reservation)  # the parts of choices that have ended

    def _cache_computed(self, sequence: DecodeSequence) -> None:
        """Let others share the full pages whose KV is here: all but that of the last token."""
        if self._hasher is None or not sequence.output:
            return
        token_ids = (*sequence.token_ids, *sequence.output[:-1])
        keys = self._hasher.keys(token_ids, sequence.cache_salt, sequence.page_keys)
        self.cache.register(keys, sequence.pages[: len(keys)])

    def _cache_received(self, request: DecodeRequest) -> None:
        """A hand-off ends before it is complete: whoever tries again need not send what is here."""
        if request.receiver.state is ReceiverState.RECEIVING:
            num_pages = request.receiver.num_received_tokens // self.layout.page_size
            keys = request.page_keys[:num_pages]
            self.cache.register(keys, request.pages[: len(keys)])

    # --- The step loop ----------------------------------------------------------------------------

    def next_batch(self, now: float) -> tuple[Batch | None, list[Effect]]:
        """What the model runs next, once no step is out any more."""
        assert not self._steps, "a step is out already"
        sequences = self._scheduler.schedule()
        if not sequences:
            self._copies.drop()
            return None, self._admit_waiting()
        if self._speculation is not None:
            self._speculation.plan(
                [sequence.drafting for sequence in sequences],
                [sequence.num_tokens_left for sequence in sequences],
            )
        for sequence in sequences:
            self._grow(sequence, sequence.num_kv_tokens)
        self._begin_step(sequences, now)
        rows = tuple(sequence.next_row() for sequence in sequences)
        return Batch(rows=rows, copies=self._copies.begin()), []

    def next_batch_ahead(self, now: float) -> Batch | None:
        """The step behind the one that runs, of which no token is known yet; None if it must wait.

        A sequence may turn out to have ended already: what the step samples for it is dropped, and
        its pages stay in use until the step is over. Whose last token is being sampled has no part
        in it. How many tokens a step with drafts samples is not known, so nothing runs ahead of it.
        """
        (step,) = self._steps
        if self._speculation is not None or self._copies.are_waiting:
            return None
        row_of = {sequence: row for row, sequence in enumerate(step.sequences)}
        sequences = [
            sequence
            for sequence in self._scheduler.schedule()
            if sequence not in row_of or sequence.num_tokens_left > 1
        ]
        if not sequences:
            return None
        for sequence in sequences:
            self._grow(sequence, sequence.num_kv_tokens + (sequence in row_of))
        self._begin_step(sequences, now)
        return Batch(rows=tuple(each.next_row(row_of.get(each)) for each in sequences))

    def drop_batch_ahead(self) -> None:
        """The step behind the one that runs, or has failed, is void, and nothing of it runs."""
        step, ahead = self._steps
        step.orphans.take_over(ahead.orphans)
        self._steps = [step]

    def _begin_step(self, sequences: list[DecodeSequence], now: float) -> None:
        orphans = OrphanedPages(self.pool)
        self._steps.append(RunningStep(sequences=sequences, began=now, orphans=orphans))

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        """The older of the steps that are out has run."""
        step = self._steps.pop(0)
        effects: list[Effect] = []
        for index, (sequence, tokens) in enumerate(zip(step.sequences, result.tokens, strict=True)):
            request = self._requests.get(sequence.key)
            if request is not None and sequence in request.sequences:
                times = step.first_times(request, now)
                logprobs = result.logprobs.get(index, ())
                effects += self._on_tokens(request, sequence, tokens, logprobs, times)
        self._copies.finish()
        step.orphans.free()
        return [*effects, *self._admit_waiting()]

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        """The model raised because of `rows`: they fail, the rest of the batch runs again.

        A choice that fails fails its request. No other step is out.
        """
        (step,) = self._steps
        self._steps = []
        effects: list[Effect] = []
        for sequence in (step.sequences[index] for index in rows):
            request = self._requests.get(sequence.key)
            if request is not None and sequence in request.sequences:
                effects += self._end(request)
                effects.append(
                    failed(
                        request.route,
                        "the decode step failed; the worker's log has the cause",
                        pb.FAILURE_CODE_INTERNAL,
                    )
                )
        self._copies.retry()
        step.orphans.free()
        return [*effects, *self._admit_waiting()]

    def _on_tokens(
        self,
        request: DecodeRequest,
        sequence: DecodeSequence,
        sampled: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        times: pb.TimeParts | None,
    ) -> list[Effect]:
        """Take the tokens of a step up to the one that ends the sequence."""
        if sequence.drafting is not None:
            self._num_drafted_tokens += sequence.drafting.num_drafts
            self._num_accepted_tokens += len(sampled) - 1
            sequence.drafting.on_step(num_accepted=len(sampled) - 1)
        reason = pb.FINISH_REASON_UNSPECIFIED
        for token in sampled:
            sequence.append(token)
            self._num_generated_tokens += 1
            reason = finish_reason(token, sequence.num_output_tokens, sequence.sampling)
            if reason:
                break
        sequence.logprobs += map(logprobs_message, logprobs)
        effects: list[Effect] = [_tokens(sequence, reason, times)]
        if reason:
            effects += self._end_choice(request, sequence)
        return effects

    # --- Time and state ---------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Renew the hand-offs under way, and give up connections whose worker leaves open what was
        refused long ago.

        Slots are not freed by a time-out: the end of the connection frees them.
        """
        standstill = self._standstill.on_tick(now)
        self._admission.forgive(standstill, now)
        self._admission.expire(now)
        self._closing_since = {
            holder: min(self._closing_since.get(holder, now) + standstill, now)
            for holder in self.slots.holders_awaited()
            if holder.key not in self._requests
        }
        overdue = {
            holder.peer: None
            for holder, since in self._closing_since.items()
            if now - since > self._closing_s
        }
        return [
            *self._admit_waiting(),
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

    def report_cache(self, routers: Iterable[bytes]) -> list[Effect]:
        """Tell the routers, all that have a session, what has changed in the prefix cache."""
        return [*self._reports.report(routers)]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left: no attempt, no promise to one, no step, and no slot that a frame
        may still reach.
        """
        is_empty = not (self._requests or self._admission.num_held or self._steps)
        return is_empty and self.slots.num_free == self.slots.num_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the books balance."""
        self.pool.check_integrity()
        self.cache.check_integrity()
        self.slots.check_integrity()

    def state(self) -> pb.WorkerState:
        """Counts as of now."""
        num_waiting = len(self._admission.waiting)
        return pb.WorkerState(
            pages=page_counts(self.pool),
            queued=num_waiting + self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            handoffs=num_waiting + len(self._receiving),
            generated_tokens=self._num_generated_tokens,
            drafted_tokens=self._num_drafted_tokens,
            accepted_tokens=self._num_accepted_tokens,
            dropped_messages=self._num_dropped,
        )

    # --- Shared -----------------------------------------------------------------------------------

    def _fail_handoff(self, request: DecodeRequest, reason: RefuseReason) -> list[Effect]:
        """What was offered cannot be used: tell the sender why, and the router."""
        request.receiver.close()
        code, text = _NO_ROOM if reason is RefuseReason.FULL else _REJECTED
        return [
            Send(message=Refused(id=request.receiver.id, reason=reason)),
            failed(request.route, text, code),
            *self._end(request),
        ]

    def _end(self, request: DecodeRequest) -> list[Effect]:
        """Forget a request and release what it holds; what is in use becomes quarantined."""
        effects = self._leave(request)
        self._admission.give_back(request)
        return [*effects, *self._admit_waiting()]

    def _leave(self, request: DecodeRequest) -> list[Effect]:
        """Forget a request, but not what its hand-off was promised and has brought.

        Slots that the sender may still write to stay out of use until it answers with Closed.
        """
        del self._requests[request.key]
        self._ended.add(request.key)
        self._receiving.pop(request.key, None)
        self._admission.leave(request)
        for sequence in request.sequences:
            self._release(sequence)
        request.sequences = []
        self._cache_received(request)
        effects: list[Effect] = []
        if request.receiver.is_open:
            refusal = Refused(id=request.receiver.id, reason=RefuseReason.ABORTED)
            effects.append(Send(message=refusal))
        request.receiver.close()
        return effects

    def _drop_held(self, request: DecodeRequest) -> None:
        """No attempt will take over what was promised to this one."""
        self._admission.leave(request)
        self._admission.give_back(request)

    def _end_choice(self, request: DecodeRequest, sequence: DecodeSequence) -> list[Effect]:
        """Forget one sequence of a request, and the request with its last one."""
        request.sequences.remove(sequence)
        self._release(sequence)
        return self._admit_waiting() if request.sequences else self._end(request)

    def _release(self, sequence: DecodeSequence) -> None:
        """Let go of all that a sequence holds. Its full pages stay in the prefix cache."""
        self._scheduler.remove(sequence)
        for step in reversed(self._steps):
            if sequence in step.sequences:
                step.orphans.adopt(sequence.pages)
                break
        self._cache_computed(sequence)
        self.pool.release(sequence.pages)
        if sequence.reservation is not None:
            self.pool.cancel(sequence.reservation)


def _tokens(
    sequence: DecodeSequence,
    reason: "pb.FinishReason.ValueType",
    times: pb.TimeParts | None = None,
) -> Emit:
    """What the router has not been told of a sequence's output."""
    tokens = pb.Tokens(
        choice=sequence.choice,
        position=sequence.num_resumed + sequence.num_emitted,
        token_ids=sequence.output[sequence.num_emitted :],
        finish_reason=reason,
        times=times,
    )
    tokens.logprobs.extend(sequence.logprobs[: len(tokens.token_ids)])
    sequence.logprobs.clear()
    sequence.num_emitted = len(sequence.output)
    return Emit(event=pb.WorkerEvent(route=reply_route(sequence.route), tokens=tokens))


def _credit(frame: Frame) -> SlotCredit:
    return SlotCredit(frame.slot, frame.slot_generation)
