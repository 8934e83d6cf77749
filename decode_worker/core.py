"""The decode worker without its network, clock and model: (state, event, now) → effects.

It reserves capacity, receives hand-offs into staging slots, runs ready sequences in one continuous
batch and tells the router their tokens. The shell (`pagewire.worker.shell`) carries the effects out
and reports back; the simulator drives the very same class.
"""

from collections import deque
from collections.abc import Collection, Iterable

from google.protobuf.message import DecodeError

from pagewire.decode_worker.drafting import Speculation
from pagewire.decode_worker.receiver import Receiver, ReceiverState
from pagewire.decode_worker.scheduler import DecodeScheduler
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.decode_worker.slots import SlotCredit, SlotHolder, SlotPool
from pagewire.engine.batch import Batch, StepResult, TokenLogprobs
from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.engine.token_history import TokenHistory
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
    Seal,
)
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageHasher
from pagewire.worker.cache_reports import CacheReports
from pagewire.worker.effects import Disconnect, Effect, Emit, Scatter, Send
from pagewire.worker.events import failed, logprobs_message, page_counts
from pagewire.worker.identity import (
    AttemptKey,
    CommandError,
    finish_reason,
    prefix_hash,
    read_work,
    reply_route,
)
from pagewire.worker.ledger import EndedAttempts
from pagewire.worker.orphans import OrphanedPages


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
        closing_s: float = 5.0,
    ) -> None:
        """`closing_s` bounds the wait for the sender of a hand-off that was given up.

        Without a `hasher` nothing is cached, without `speculation` nothing is drafted.
        """
        self.incarnation = incarnation
        self.layout = layout
        self.pool = pool
        self.cache = PrefixCache(pool)
        self._reports = CacheReports(self.cache, incarnation)
        self._hasher = hasher
        self.slots = slots
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._slot_bytes = slot_bytes
        self._speculation = speculation
        self._max_slots_per_handoff = max_slots_per_handoff
        self._closing_s = closing_s
        self._closing_since: dict[SlotHolder, float] = {}  # ended, may still write their slots
        self._scheduler = DecodeScheduler(max_batch_size)
        self._sequences: dict[AttemptKey, DecodeSequence] = {}
        self._waiting: deque[DecodeSequence] = deque()  # opened, not reserved yet
        self._receiving: dict[AttemptKey, DecodeSequence] = {}
        self._batch: list[DecodeSequence] = []  # the step that runs now
        self._orphans = OrphanedPages(pool)
        self._scattering: dict[tuple[AttemptKey, int], list[int]] = {}  # pages, by frame
        self._ended = EndedAttempts()
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
                return self._on_attach(key, command)
            case "abort":
                return self._on_abort(key, command.route.sender)
            case "kv_snapshot":
                self._reports.forget(command.route.sender)
                return []
            case body:
                return [failed(command.route, f"a decode worker takes no {body}")]

    def on_session_lost(self, router: bytes) -> list[Effect]:
        """The router is gone: so is everybody who waits for its requests."""
        self._reports.forget(router)
        return [
            effect
            for sequence in list(self._sequences.values())
            if sequence.route.sender == router
            for effect in self._end(sequence)
        ]

    def _on_attach(self, key: AttemptKey, command: pb.WorkerCommand) -> list[Effect]:
        if key in self._sequences or key in self._ended:
            self._num_dropped += 1
            return []
        try:
            self._sequences[key] = self._read_attach(key, command)
        except CommandError as error:
            self._ended.add(key)
            return [failed(command.route, str(error))]
        return [
            Emit(event=pb.WorkerEvent(route=reply_route(command.route), attached=pb.Attached()))
        ]

    def _read_attach(self, key: AttemptKey, command: pb.WorkerCommand) -> DecodeSequence:
        body = command.attach
        token_ids, sampling = read_work(
            body, vocab_size=self._vocab_size, max_model_len=self._max_model_len
        )
        receiver = Receiver(
            id=HandoffId(
                request_id=key.request_id,
                attempt=key.attempt,
                sender=self.incarnation,
                receiver=body.prefill,
            ),
            ticket=body.ticket,
            prefix_hash=prefix_hash(token_ids),
            num_prompt_tokens=len(token_ids),
            layout=self.layout,
        )
        sequence = DecodeSequence(
            key=key,
            route=command.route,
            token_ids=token_ids,
            sampling=sampling,
            history=TokenHistory.for_params(sampling, token_ids),
            receiver=receiver,
            cache_salt=body.cache_salt,
            page_keys=self._hasher.keys(token_ids, body.cache_salt) if self._hasher else (),
            priority=body.priority,
            drafting=self._speculation.drafting(token_ids, sampling) if self._speculation else None,
        )
        num_pages = self.layout.num_pages(sequence.num_reserved_tokens)
        if num_pages > self.pool.num_pages:
            raise CommandError(
                f"prompt and max_tokens take {num_pages} pages of KV cache; this worker has "
                f"{self.pool.num_pages}"
            )
        return sequence

    def _on_abort(self, key: AttemptKey, router: bytes) -> list[Effect]:
        sequence = self._sequences.get(key)
        if sequence is None:
            self._ended.add(key)
            return []
        return self._end(sequence) if sequence.route.sender == router else []

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
                return self._on_seal(message)
            case Closed():
                return self._on_closed(message)
            case _:
                self._num_dropped += 1
                return []

    def place(self, peer: bytes, frame: Frame, length: int) -> tuple[int | None, list[Effect]]:
        """The slot into which the payload of `frame` may be written; None to discard it."""
        sequence = self._addressee(frame.id)
        if (
            sequence is None
            or frame.id.sender != peer
            or sequence.receiver.state is not ReceiverState.RECEIVING
            or sequence.receiver.is_repeated(frame)
        ):
            self._num_dropped += 1
            return None, []
        if length > self._slot_bytes:
            return None, self._fail_handoff(sequence, RefuseReason.LAYOUT)
        if not sequence.receiver.agrees(frame, length):
            return None, self._fail_handoff(sequence, RefuseReason.INTEGRITY)
        if not self.slots.begin_landing(_credit(frame), sequence.holder):
            self._num_dropped += 1
            return None, []
        sequence.receiver.on_landing(frame)
        return frame.slot, []

    def on_scattered(self, frame: Frame, is_sound: bool) -> list[Effect]:
        """The slot of `frame` is not read any more; its bytes are in pages if they were sound."""
        key = AttemptKey.of(frame.id)
        self.pool.unpin(self._scattering.pop((key, frame.seq)))
        self.slots.free(frame.slot)
        sequence = self._addressee(frame.id)
        if sequence is None:  # its pages were quarantined until now
            return self._admit_waiting()
        if not is_sound:
            return self._fail_handoff(sequence, RefuseReason.INTEGRITY)
        fault = sequence.receiver.on_scattered(frame)
        if fault is not None:
            return self._fail_handoff(sequence, fault)
        ack = Send(message=FrameAck(id=sequence.receiver.id, seq=frame.seq))
        return [ack, *self._join_if_ready(sequence), *self._grant_slots()]

    def on_peer_lost(self, peer: bytes) -> list[Effect]:
        """A prefill worker is gone, or cannot be reached; nothing writes its slots any more."""
        self.slots.reclaim_peer(peer)
        effects: list[Effect] = []
        for sequence in list(self._sequences.values()):
            receiver = sequence.receiver
            if receiver.id.receiver == peer and receiver.is_open and receiver.needs_sender:
                receiver.close()
                effects += self._end(sequence)
                effects.append(
                    failed(
                        sequence.route,
                        "the connection to the prefill worker was lost during the hand-off",
                        pb.FAILURE_CODE_PEER_LOST,
                    )
                )
        return [*effects, *self._grant_slots()]

    def _on_open(self, message: Open) -> list[Effect]:
        sequence = self._addressee(message.id)
        if sequence is None:
            refusal = Refused(id=message.id.reply(), reason=RefuseReason.UNKNOWN_TICKET)
            return [Send(message=refusal)]
        if sequence.receiver.state is not ReceiverState.EXPECTED:
            self._num_dropped += 1
            return []
        reason = sequence.receiver.on_open(message)
        if reason is RefuseReason.UNKNOWN_TICKET:
            return [Send(message=Refused(id=message.id.reply(), reason=reason))]
        if reason is not None:
            return self._fail_handoff(sequence, reason)
        self._waiting.append(sequence)
        return self._admit_waiting()

    def _on_frame(self, frame: Frame) -> list[Effect]:
        holder = SlotHolder(AttemptKey.of(frame.id), frame.id.sender)
        if not self.slots.begin_scatter(_credit(frame), holder):
            self._num_dropped += 1
            return []
        sequence = self._addressee(frame.id)
        if sequence is None:  # aborted while the frame was landing
            self.slots.free(frame.slot)
            return self._grant_slots()
        sequence.receiver.on_landed(frame)
        self._grow(sequence, sequence.num_prompt_tokens)
        pages = [sequence.pages[index] for index in sequence.receiver.pages_of(frame)]
        self.pool.pin(pages)
        self._scattering[sequence.key, frame.seq] = pages
        source = sequence.receiver.source
        return [Scatter(frame=frame, source=source, page_table=tuple(sequence.pages))]

    def _on_seal(self, seal: Seal) -> list[Effect]:
        sequence = self._addressee(seal.id)
        if sequence is None or sequence.receiver.state is not ReceiverState.RECEIVING:
            self._num_dropped += 1
            return []
        if seal.first_token >= self._vocab_size or finish_reason(
            seal.first_token, 1, sequence.sampling
        ):  # such a token has no hand-off behind it
            return self._fail_handoff(sequence, RefuseReason.INTEGRITY)
        if sequence.sampling.num_logprobs is not None:
            try:
                sequence.logprobs = [pb.TokenLogprobs.FromString(seal.first_logprobs)]
            except DecodeError:
                return self._fail_handoff(sequence, RefuseReason.INTEGRITY)
        fault = sequence.receiver.on_seal(seal)
        if fault is not None:
            return self._fail_handoff(sequence, fault)
        return self._join_if_ready(sequence)

    def _on_closed(self, message: Closed) -> list[Effect]:
        self.slots.reclaim_granted(SlotHolder(AttemptKey.of(message.id), message.id.sender))
        sequence = self._addressee(message.id)
        if sequence is None or not sequence.receiver.is_open:
            return self._grant_slots()
        sequence.receiver.close()  # the sender tells the router why
        return self._end(sequence)

    def _addressee(self, id: HandoffId) -> DecodeSequence | None:
        sequence = self._sequences.get(AttemptKey.of(id))
        if sequence is None or id != sequence.receiver.id.reply():
            return None
        return sequence

    # --- Capacity ---------------------------------------------------------------------------------

    def _admit_waiting(self) -> list[Effect]:
        """Reserve for those who wait, first come, first served: the sum never exceeds the pool.

        Pages of the prompt that are cached here need no room, and are not sent. Of smaller pages
        than the sender's so many are used that they make whole ones of it: frames are whole pages,
        and must not write into one that is shared.
        """
        effects: list[Effect] = []
        while self._waiting:
            sequence = self._waiting[0]
            num_pages = self.layout.num_pages(sequence.num_reserved_tokens)
            unit = sequence.receiver.hit_unit
            reserved = self.cache.reserve(sequence.page_keys, num_pages, unit=unit)
            if reserved is None:
                break
            self._waiting.popleft()
            sequence.pages = list(reserved.hits)
            sequence.reservation = reserved.reservation
            num_hit_pages = sequence.receiver.on_reserved(len(reserved.hits))
            self._receiving[sequence.key] = sequence
            accepted = Accepted(id=sequence.receiver.id, num_hit_pages=num_hit_pages)
            effects.append(Send(message=accepted))
        return [*effects, *self._grant_slots()]

    def _grant_slots(self) -> list[Effect]:
        """Hand out free slots, one at a time to the hand-off that holds the fewest."""
        effects: list[Effect] = []
        while self.slots.num_free:
            candidates = [
                sequence
                for sequence in self._receiving.values()
                if sequence.receiver.wants_credit
                and self.slots.num_held(sequence.holder) < self._max_slots_per_handoff
            ]
            if not candidates:
                break
            sequence = min(candidates, key=lambda item: self.slots.num_held(item.holder))
            credit = self.slots.grant(sequence.holder)
            grant = Grant(
                id=sequence.receiver.id, slot=credit.slot, slot_generation=credit.generation
            )
            effects.append(Send(message=grant))
        return effects

    def _grow(self, sequence: DecodeSequence, num_tokens: int) -> None:
        """Give a sequence pages for `num_tokens` tokens, out of its Reservation."""
        missing = self.layout.num_pages(num_tokens) - len(sequence.pages)
        if missing > 0:
            assert sequence.reservation is not None, "a sequence grows after it was reserved for"
            sequence.pages += self.pool.take(sequence.reservation, missing)

    def _join_if_ready(self, sequence: DecodeSequence) -> list[Effect]:
        """Put a complete hand-off into the running batch and let the sender free its pages."""
        receiver = sequence.receiver
        if receiver.state is not ReceiverState.READY or receiver.seal is None:
            return []
        del self._receiving[sequence.key]
        self.slots.reclaim_granted(sequence.holder)
        sequence.append(receiver.seal.first_token)
        self._cache_computed(sequence)
        self._scheduler.add(sequence)
        ready = pb.WorkerEvent(route=reply_route(sequence.route), ready=pb.Ready())
        return [
            Send(message=Committed(id=receiver.id)),
            Emit(event=ready),
            *self._grant_slots(),
        ]

    def _cache_computed(self, sequence: DecodeSequence) -> None:
        """Let others share the full pages whose KV is here: all but that of the last token."""
        if self._hasher is None or not sequence.output:
            return
        token_ids = (*sequence.token_ids, *sequence.output[:-1])
        keys = self._hasher.keys(token_ids, sequence.cache_salt, sequence.page_keys)
        self.cache.register(keys, sequence.pages[: len(keys)])

    # --- The step loop ----------------------------------------------------------------------------

    def next_batch(self, now: float) -> tuple[Batch | None, list[Effect]]:
        """What the model runs next. At most one batch is out at a time."""
        assert not self._batch, "a batch is out already"
        self._batch = self._scheduler.schedule()
        if not self._batch:
            return None, []
        if self._speculation is not None:
            self._speculation.plan(
                [sequence.drafting for sequence in self._batch],
                [sequence.num_tokens_left for sequence in self._batch],
            )
        for sequence in self._batch:
            self._grow(sequence, sequence.num_kv_tokens)
        return Batch(rows=tuple(sequence.next_row() for sequence in self._batch)), []

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        """The step has run."""
        batch, self._batch = self._batch, []
        effects: list[Effect] = []
        for index, (sequence, tokens) in enumerate(zip(batch, result.tokens, strict=True)):
            if self._sequences.get(sequence.key) is sequence:
                effects += self._on_tokens(sequence, tokens, result.logprobs.get(index, ()))
        self._orphans.free()
        return [*effects, *self._admit_waiting()]

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        """The model raised because of `rows`: they fail, the rest of the batch runs again."""
        batch, self._batch = self._batch, []
        effects: list[Effect] = []
        for index, sequence in enumerate(batch):
            if index in rows and self._sequences.get(sequence.key) is sequence:
                effects += self._end(sequence)
                effects.append(
                    failed(
                        sequence.route,
                        "the decode step failed; the worker's log has the cause",
                        pb.FAILURE_CODE_INTERNAL,
                    )
                )
        self._orphans.free()
        return [*effects, *self._admit_waiting()]

    def _on_tokens(
        self,
        sequence: DecodeSequence,
        sampled: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
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
            reason = finish_reason(token, len(sequence.output), sequence.sampling)
            if reason:
                break
        tokens = pb.Tokens(
            position=sequence.num_emitted,
            token_ids=sequence.output[sequence.num_emitted :],
            finish_reason=reason,
        )
        if sequence.sampling.num_logprobs is not None:
            sequence.logprobs += map(logprobs_message, logprobs)
            tokens.logprobs.extend(sequence.logprobs[: len(tokens.token_ids)])
            sequence.logprobs.clear()
        sequence.num_emitted = len(sequence.output)
        effects: list[Effect] = [
            Emit(event=pb.WorkerEvent(route=reply_route(sequence.route), tokens=tokens))
        ]
        if reason:
            effects += self._end(sequence)
        return effects

    # --- Time and state ---------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Give up connections whose worker leaves hand-offs open that were refused long ago.

        Slots are not freed by a time-out: the end of the connection frees them.
        """
        self._closing_since = {
            holder: self._closing_since.get(holder, now)
            for holder in self.slots.holders_awaited()
            if holder.key not in self._sequences
        }
        overdue = {
            holder.peer: None
            for holder, since in self._closing_since.items()
            if now - since > self._closing_s
        }
        return [Disconnect(peer=peer) for peer in overdue]

    def report_cache(self, routers: Iterable[bytes]) -> list[Effect]:
        """Tell the routers, all that have a session, what has changed in the prefix cache."""
        return [*self._reports.report(routers)]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left: no attempt, no step, no slot that a frame may still reach."""
        return not (self._sequences or self._batch) and self.slots.num_free == self.slots.num_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the books balance."""
        self.pool.check_integrity()
        self.cache.check_integrity()
        self.slots.check_integrity()

    def state(self) -> pb.WorkerState:
        """Counts as of now."""
        return pb.WorkerState(
            pages=page_counts(self.pool),
            queued=len(self._waiting) + self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            handoffs=len(self._waiting) + len(self._receiving),
            generated_tokens=self._num_generated_tokens,
            drafted_tokens=self._num_drafted_tokens,
            accepted_tokens=self._num_accepted_tokens,
            dropped_messages=self._num_dropped,
        )

    # --- Shared -----------------------------------------------------------------------------------

    def _fail_handoff(self, sequence: DecodeSequence, reason: RefuseReason) -> list[Effect]:
        """What arrived cannot be used: tell the sender why, and the router."""
        sequence.receiver.close()
        refusal = Refused(id=sequence.receiver.id, reason=reason)
        text = "the decode worker rejected a hand-off that failed its checks"
        return [
            Send(message=refusal),
            failed(sequence.route, text, pb.FAILURE_CODE_INTEGRITY),
            *self._end(sequence),
        ]

    def _end(self, sequence: DecodeSequence) -> list[Effect]:
        """Forget a sequence and release what it holds; what is in use becomes quarantined.

        Its full pages stay in the prefix cache.

        Slots that the sender may still write to stay out of use until it answers with Closed.
        """
        del self._sequences[sequence.key]
        self._ended.add(sequence.key)
        self._receiving.pop(sequence.key, None)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._scheduler.remove(sequence)
        if sequence in self._batch:
            self._orphans.adopt(sequence.pages)
        self._cache_computed(sequence)
        self.pool.release(sequence.pages)
        if sequence.reservation is not None:
            self.pool.cancel(sequence.reservation)
        effects: list[Effect] = []
        if sequence.receiver.is_open:
            refusal = Refused(id=sequence.receiver.id, reason=RefuseReason.ABORTED)
            effects.append(Send(message=refusal))
        sequence.receiver.close()
        return [*effects, *self._admit_waiting()]


def _credit(frame: Frame) -> SlotCredit:
    return SlotCredit(frame.slot, frame.slot_generation)
