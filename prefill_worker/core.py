"""The prefill worker without its network, clock and model: (state, event, now) → effects.

It queues prompts, says which chunks a step runs, hands computed pages to senders and answers the
router. The shell (`pagewire.worker.shell`) carries the effects out and reports back; the simulator
drives the very same class.
"""

from collections.abc import Collection, Iterable

from pagewire.engine.batch import Batch, BatchRow, StepResult, TokenLogprobs
from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.kv_transfer.layout import KVLayout, require_slot
from pagewire.kv_transfer.messages import (
    ID_BYTES,
    Accepted,
    Closed,
    Committed,
    Frame,
    FrameAck,
    Grant,
    HandoffId,
    Message,
    Refused,
    Renew,
    Seal,
)
from pagewire.prefill_worker.events import first_tokens, parked, sealed
from pagewire.prefill_worker.layer_groups import layer_group_ends
from pagewire.prefill_worker.outgoing_frames import OutgoingFrames
from pagewire.prefill_worker.prompts import PromptReader, addresses
from pagewire.prefill_worker.refusals import PASSING, REFUSALS
from pagewire.prefill_worker.scheduler import Chunk, PrefillScheduler
from pagewire.prefill_worker.sender import Sender, SenderState
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageHasher
from pagewire.worker.attempts import Attempts
from pagewire.worker.cache_reports import CacheReports
from pagewire.worker.effects import Connect, Disconnect, Effect, Send
from pagewire.worker.events import failed, logprobs_message, page_counts, step_failed
from pagewire.worker.identity import AttemptKey, CommandError, finish_reason
from pagewire.worker.interval import Interval
from pagewire.worker.orphans import OrphanedPages
from pagewire.worker.standstill import Standstill


class PrefillCore:
    """All state of a prefill worker. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        *,
        incarnation: bytes,
        layout: KVLayout,
        pool: PagePool,
        vocab_size: int,
        max_model_len: int,
        max_batch_tokens: int,
        slot_bytes: int,
        hasher: PageHasher | None = None,
        stream_layers: bool = True,
        answer_s: float = 5.0,
        send_s: float = 30.0,
        lease_s: float = 10.0,
        max_parked_share: float = 0.5,
    ) -> None:
        """Without a `hasher` nothing is cached; `answer_s` and `send_s`: see Sender.is_stalled.

        With `stream_layers` the KV of a prompt's last chunk leaves by groups of layers while they
        are computed, otherwise at the end of the step. `lease_s` is how long a prompt stays parked
        while its router says nothing of it. While more than `max_parked_share` of the pages wait
        for decode workers, no prompt starts.
        Raises LayoutError when not even one layer of a page fits in `slot_bytes`.
        """
        require_slot(layout, slot_bytes)
        self.incarnation = incarnation
        self.layout = layout
        self.pool = pool
        self.cache = PrefixCache(pool)
        self._reports = CacheReports(self.cache, incarnation)
        self._reader = PromptReader(
            layout=layout,
            num_pages=pool.num_pages,
            slot_bytes=slot_bytes,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            hasher=hasher,
        )
        self._slot_bytes = slot_bytes
        self._stream_layers = stream_layers
        self._answer_s = answer_s
        self._send_s = send_s
        self._lease_s = lease_s
        self.max_parked_pages = int(max_parked_share * pool.num_pages)
        self._scheduler = PrefillScheduler(self.cache, layout, max_batch_tokens)
        self._attempts: Attempts[PrefillSequence] = Attempts()
        self._batch: list[Chunk] = []  # the step that runs now
        self._orphans = OrphanedPages(pool)
        self._outgoing = OutgoingFrames(pool)
        self._standstill = Standstill()
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_dropped = 0

    # --- From the router --------------------------------------------------------------------------

    def on_command(self, command: pb.WorkerCommand, now: float) -> list[Effect]:
        key = AttemptKey.of(command.route)
        if command.route.receiver != self.incarnation:
            self._num_dropped += 1
            return []
        match command.WhichOneof("body"):
            case "prefill":
                return self._on_prefill(key, command, now)
            case "repoint":
                return self._on_repoint(key, command, now)
            case "renew_lease":
                self._on_renew_lease(key, command.route.sender, now)
                return []
            case "abort":
                return self._on_abort(key, command.route.sender)
            case "kv_snapshot":
                self._reports.forget(command.route.sender)
                return []
            case body:
                return [failed(command.route, f"a prefill worker takes no {body}")]

    def on_session_lost(self, router: bytes) -> list[Effect]:
        """The router is gone: so is everybody who waits for its requests."""
        self._reports.forget(router)
        return [
            effect for sequence in self._attempts.sent_by(router) for effect in self._end(sequence)
        ]

    def _on_prefill(self, key: AttemptKey, command: pb.WorkerCommand, now: float) -> list[Effect]:
        if self._attempts.knows(key):
            self._num_dropped += 1
            return []
        try:
            sequence = self._reader.sequence(command, now)
        except CommandError as error:
            self._attempts.rule_out(key)
            return [failed(command.route, str(error))]
        self._attempts.begin(sequence)
        self._scheduler.add(sequence)
        return []

    def _on_repoint(self, key: AttemptKey, command: pb.WorkerCommand, now: float) -> list[Effect]:
        """Hand what an earlier attempt has computed to the decode worker of this one.

        It may come before the loss of the earlier decode worker is noticed here.
        """
        if self._attempts.knows(key):
            self._num_dropped += 1
            return []
        body = command.repoint
        if len(body.ticket) != ID_BYTES:
            self._attempts.rule_out(key)
            return [failed(command.route, f"ticket is not {ID_BYTES} bytes")]
        held = AttemptKey(key.request_id, body.held_attempt)
        sequence = self._attempts.get(held)
        if sequence is None or sequence.route.sender != command.route.sender:
            self._attempts.rule_out(key)
            if sequence is None:  # its Prefill may still come
                self._attempts.rule_out(held)
            text = "the pages of the prompt are not on this prefill worker any more"
            return [failed(command.route, text, pb.FAILURE_CODE_NOT_PARKED)]
        effects: list[Effect] = [Send(message=message) for message in sequence.sender.close()]
        self._attempts.end(sequence)
        sequence.repoint(
            key=key,
            route=command.route,
            sender=self._reader.sender(command.route, body, sequence.token_ids),
            addresses=addresses(body),
        )
        self._attempts.begin(sequence)
        return [*effects, *(self._resume(sequence, now) if sequence.started is not None else [])]

    def _resume(self, sequence: PrefillSequence, now: float) -> list[Effect]:
        """Open the hand-off of a prompt that has started, with what is computed of it.

        Token 0 is told again: what the earlier attempt said of it may have come too late.
        """
        effects = self._open(sequence, now)
        if not sequence.first_tokens:
            return effects
        return [*first_tokens(sequence), *effects, *self._finish(sequence, now)]

    def _on_renew_lease(self, key: AttemptKey, router: bytes, now: float) -> None:
        """The router has no decode worker for the prompt yet, and still wants it."""
        sequence = self._attempts.get(key)
        if sequence is not None and sequence.is_parked and sequence.route.sender == router:
            sequence.lease_until = now + self._lease_s

    def _on_abort(self, key: AttemptKey, router: bytes) -> list[Effect]:
        sequence = self._attempts.get(key)
        if sequence is None:
            self._attempts.rule_out(key)
            return []
        return self._end(sequence) if sequence.route.sender == router else []

    # --- From the decode worker -------------------------------------------------------------------

    def on_message(self, peer: bytes, message: Message, now: float) -> list[Effect]:
        """A message from the worker `peer`."""
        if (message.id.sender, message.id.receiver) != (peer, self.incarnation):
            self._num_dropped += 1
            return []
        sequence = self._addressee(message.id)
        if sequence is None:
            self._num_dropped += 1
            return self._confirm_closed(message)
        match message:
            case Accepted():
                return self._on_accepted(sequence, message, now)
            case Grant():
                return self._carry_out(sequence, sequence.sender.on_grant(message, now))
            case FrameAck():
                sequence.sender.on_ack(message.seq, now)
                return []
            case Renew():
                sequence.sender.on_renew(now)
                return []
            case Committed():
                sequence.sender.on_committed()
                return self._end(sequence) if not sequence.sender.is_open else []
            case Refused():
                code, text = REFUSALS[message.reason]
                if message.reason in PASSING:
                    return self._park(sequence, code, text, now)
                return [*self._end(sequence), failed(sequence.route, text, code)]
            case _:
                self._num_dropped += 1
                return []

    def _on_accepted(
        self, sequence: PrefillSequence, message: Accepted, now: float
    ) -> list[Effect]:
        if not sequence.sender.can_accept(message.num_hit_pages):
            text = "the decode worker claims to have more pages than the prompt takes"
            failure = failed(sequence.route, text, pb.FAILURE_CODE_INTEGRITY)
            return [*self._end(sequence), failure]
        return self._carry_out(sequence, sequence.sender.on_accepted(message.num_hit_pages, now))

    def on_peer_lost(self, peer: bytes, now: float) -> list[Effect]:
        """The decode worker is gone, or cannot be reached."""
        effects: list[Effect] = []
        text = "the connection to the decode worker was lost during the hand-off"
        for sequence in self._attempts:
            if sequence.sender.id.receiver == peer and sequence.sender.is_open:
                sequence.sender.on_peer_lost()
                if not sequence.is_parked:
                    effects += self._park(sequence, pb.FAILURE_CODE_PEER_LOST, text, now)
        for sender in self._outgoing.senders:
            if sender.id.receiver == peer:
                sender.on_peer_lost()
        return effects

    def _park(
        self,
        sequence: PrefillSequence,
        code: "pb.FailureCode.ValueType",
        text: str,
        now: float,
    ) -> list[Effect]:
        """The hand-off has failed: keep the pages for another one, and go on computing."""
        sequence.lease_until = now + self._lease_s
        messages = sequence.sender.close()
        return [*(Send(message=message) for message in messages), parked(sequence, code, text)]

    def on_frame_sent(
        self, frame: Frame, checksum: int | None, now: float, gathered: Interval | None = None
    ) -> list[Effect]:
        """The pages of `frame` are not read any more; without a checksum it was not sent.

        `gathered` is when its checksum was made, where that is known.
        """
        messages = self._outgoing.end(frame).on_sent(frame.seq, checksum, now, gathered)
        sequence = self._attempts.get(AttemptKey.of(frame.id))
        if sequence is not None:
            return self._carry_out(sequence, messages)
        return [Send(message=message) for message in messages]

    def _confirm_closed(self, message: Message) -> list[Effect]:
        """Answer the refusal of a hand-off that is forgotten here: its slots are still granted.

        While one of its frames is being sent, Closed will follow that frame anyway.
        """
        if not isinstance(message, Refused):
            return []
        if self._outgoing.has_any_of(AttemptKey.of(message.id)):
            return []
        return [Send(message=Closed(id=message.id.reply()))]

    def _addressee(self, id: HandoffId) -> PrefillSequence | None:
        sequence = self._attempts.get(AttemptKey.of(id))
        if sequence is None or sequence.is_parked or id != sequence.sender.id.reply():
            return None
        return sequence

    # --- The step loop ----------------------------------------------------------------------------

    def next_batch(self, now: float) -> tuple[Batch | None, list[Effect]]:
        """What the model runs next. At most one batch is out at a time."""
        assert not self._batch, "a batch is out already"
        may_start = self._num_parked_pages() <= self.max_parked_pages
        self._batch = self._scheduler.schedule(now, may_start=may_start)
        if not self._batch:
            return None, []
        effects = [
            effect
            for chunk in self._batch
            if chunk.sequence.started is None
            for effect in self._start(chunk.sequence, now)
        ]
        rows = tuple(_row(chunk) for chunk in self._batch)
        return Batch(rows=rows, layer_group_ends=self._layer_group_ends()), effects

    def next_batch_ahead(self, now: float) -> Batch | None:
        """None: what leaves after a step depends on how it ended."""
        return None

    def drop_batch_ahead(self) -> None:
        """There is none."""

    def _layer_group_ends(self) -> tuple[int, ...]:
        """Where the step that is to run reports; nowhere when no prompt ends in it."""
        num_pages = sum(
            len(chunk.sequence.pages) - chunk.sequence.num_computed // self.layout.page_size
            for chunk in self._batch
            if chunk.is_last
        )
        if not (num_pages and self._stream_layers):
            return ()
        return layer_group_ends(self.layout, num_pages, self._slot_bytes)

    def _start(self, sequence: PrefillSequence, now: float) -> list[Effect]:
        """The first chunk is scheduled."""
        sequence.started = now
        return self._open(sequence, now)

    def _open(self, sequence: PrefillSequence, now: float) -> list[Effect]:
        """Begin the hand-off. Pages out of the cache are complete and can leave at once."""
        messages = sequence.sender.open(now, age_s=now - sequence.submitted)
        messages += sequence.sender.on_computed(sequence.num_computed, now)
        return self._carry_out(sequence, messages)

    def _finish(self, sequence: PrefillSequence, now: float) -> list[Effect]:
        """The prompt is computed and token 0 sampled: what is left of the hand-off."""
        logprobs = tuple(each.SerializeToString() for each in sequence.first_logprobs)
        messages = sequence.sender.on_computed(sequence.num_computed, now)
        messages += sequence.sender.finish(sequence.first_tokens, now, logprobs)
        return self._carry_out(sequence, messages)

    def on_layers_done(self, num_layers: int, now: float) -> list[Effect]:
        """The first `num_layers` layers of the step that runs are computed.

        Of prompts that end in it these layers are complete and leave at once.
        """
        return [
            effect
            for chunk in self._batch
            if chunk.is_last and chunk.sequence in self._attempts
            for effect in self._carry_out(
                chunk.sequence, chunk.sequence.sender.on_layers_computed(num_layers, now)
            )
        ]

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        """The step has run."""
        batch, self._batch = self._batch, []
        effects: list[Effect] = []
        for index, (chunk, tokens) in enumerate(zip(batch, result.tokens, strict=True)):
            if chunk.sequence in self._attempts:
                logprobs = result.logprobs.get(index, ())
                effects += self._on_chunk_done(chunk, tokens, logprobs, now)
        self._orphans.free()
        return effects

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        """The model raised because of `rows`: they fail, the rest of the batch runs again."""
        batch, self._batch = self._batch, []
        effects: list[Effect] = []
        for index, chunk in enumerate(batch):
            if chunk.sequence not in self._attempts:
                continue
            if index not in rows:
                self._scheduler.put_back(chunk)
            else:
                effects += self._end(chunk.sequence)
                effects.append(step_failed(chunk.sequence.route, "prefill"))
        self._orphans.free()
        return effects

    def _on_chunk_done(
        self,
        chunk: Chunk,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        now: float,
    ) -> list[Effect]:
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        self._num_prompt_tokens += chunk.num_tokens
        self._cache_computed(sequence)
        if not tokens:
            return self._carry_out(
                sequence, sequence.sender.on_computed(sequence.num_computed, now)
            )
        self._num_generated_tokens += len(tokens)
        sequence.first_tokens = tokens
        sequence.first_logprobs = tuple(logprobs_message(each) for each in logprobs)
        started = sequence.started
        assert started is not None, "a chunk that has run was scheduled"
        times = pb.TimeParts(queue_s=started - sequence.arrived, prefill_s=now - started)
        token_0 = first_tokens(sequence, times)
        num_tokens = sequence.num_resumed + 1
        if all(finish_reason(token, num_tokens, sequence.sampling) for token in tokens):
            return [*token_0, *self._end(sequence)]
        return [*token_0, *self._finish(sequence, now)]

    def _cache_computed(self, sequence: PrefillSequence) -> None:
        """Let others share the full pages that are computed: now, not before."""
        num_pages = sequence.num_computed // self.layout.page_size
        keys = sequence.page_keys[:num_pages]
        self.cache.register(keys, sequence.pages[: len(keys)])

    # --- Time and state ---------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Park what has stalled, give up the connections on which it has, and end what is parked
        when its lease runs out. Time in which this process stood still does not count.
        """
        self._forgive(self._standstill.on_tick(now), now)
        effects: list[Effect] = []
        stalled: dict[bytes, None] = {}  # peers, in order
        for sequence in self._attempts:
            if sequence.lease_until is not None:
                effects += self._expire(sequence) if now > sequence.lease_until else []
            elif self._is_stalled(sequence.sender, now):
                stalled[sequence.sender.id.receiver] = None
                text = "the hand-off made no progress and was given up"
                effects += self._park(sequence, pb.FAILURE_CODE_STALLED, text, now)
        for sender in self._outgoing.senders:
            if self._is_stalled(sender, now):
                stalled[sender.id.receiver] = None
        return [*effects, *(Disconnect(peer=peer) for peer in stalled)]

    def _forgive(self, seconds: float, now: float) -> None:
        """This process stood still for so long: no decode worker and no router could reach it."""
        senders = set(self._outgoing.senders)
        for sequence in self._attempts:
            senders.add(sequence.sender)
            if sequence.lease_until is not None:
                sequence.lease_until = min(sequence.lease_until + seconds, now + self._lease_s)
        for sender in senders:
            sender.forgive(seconds, now)

    def _expire(self, sequence: PrefillSequence) -> list[Effect]:
        text = "no decode worker took the prompt over before its lease ran out"
        failure = failed(sequence.route, text, pb.FAILURE_CODE_NOT_PARKED)
        return [*self._end(sequence), failure]

    def _is_stalled(self, sender: Sender, now: float) -> bool:
        return sender.is_stalled(now, answer_s=self._answer_s, send_s=self._send_s)

    def report_cache(self, routers: Iterable[bytes]) -> list[Effect]:
        """Tell the routers, all that have a session, what has changed in the prefix cache."""
        return [*self._reports.report(routers)]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left: no attempt, no step, no frame that is being sent."""
        return not (len(self._attempts) or self._batch or len(self._outgoing))

    def has_handoff(self, peer: bytes) -> bool:
        """Whether a hand-off to the decode worker `peer` is under way, or a frame of one."""
        senders = [sequence.sender for sequence in self._attempts]
        senders += self._outgoing.senders
        return any(sender.is_open and sender.id.receiver == peer for sender in senders)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the books balance."""
        self.pool.check_integrity()
        self.cache.check_integrity()

    def state(self) -> pb.WorkerState:
        """Counts as of now."""
        return pb.WorkerState(
            pages=page_counts(self.pool),
            queued=self._scheduler.num_queued,
            running=len(self._batch),
            handoffs=sum(sequence.sender.is_open for sequence in self._attempts),
            queued_tokens=self._scheduler.num_queued_tokens,
            prompt_tokens=self._num_prompt_tokens,
            generated_tokens=self._num_generated_tokens,
            dropped_messages=self._num_dropped,
            parked_pages=self._num_parked_pages(),
        )

    # --- Shared -----------------------------------------------------------------------------------

    def _num_parked_pages(self) -> int:
        """Pages of prompts that wait for a decode worker and for nothing else."""
        return sum(len(sequence.pages) for sequence in self._attempts if sequence.waits_for_decode)

    def _end(self, sequence: PrefillSequence) -> list[Effect]:
        """Forget a sequence and release its pages; those still in use become quarantined."""
        self._attempts.end(sequence)
        self._scheduler.remove(sequence)
        if any(chunk.sequence is sequence for chunk in self._batch):
            self._orphans.adopt(sequence.pages)
        self.pool.release(sequence.pages)
        return [Send(message=message) for message in sequence.sender.close()]

    def _carry_out(self, sequence: PrefillSequence, messages: Iterable[Message]) -> list[Effect]:
        effects: list[Effect] = []
        for message in messages:
            match message:
                case Frame():
                    effects.append(self._outgoing.begin(sequence, message))
                case Seal():
                    effects += [Send(message=message), sealed(sequence)]
                case _:
                    if sequence.sender.state is SenderState.STREAMING:
                        peer = sequence.sender.id.receiver
                        effects.append(Connect(peer=peer, addresses=sequence.addresses))
                    effects.append(Send(message=message))
        return effects


def _row(chunk: Chunk) -> BatchRow:
    sequence = chunk.sequence
    start = sequence.num_computed
    return BatchRow(
        request_id=sequence.key.request_id,
        token_ids=sequence.token_ids[start : start + chunk.num_tokens],
        start=start,
        page_table=sequence.pages,
        sampling=sequence.sampling if chunk.is_last else None,
        output_position=sequence.num_resumed,
        siblings=sequence.siblings if chunk.is_last else (),
        history=sequence.history,
    )
