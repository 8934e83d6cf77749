"""The decode worker without its network, clock and model: (state, event, now) → effects.

It composes the hand-offs that come in and the batch of what has come. The shell
(`pagewire.worker.shell`) carries the effects out and reports back; the simulator drives the very
same class.
"""

from collections.abc import Collection, Iterable

from pagewire.decode_worker.admission import Admission
from pagewire.decode_worker.attach import AttachReader
from pagewire.decode_worker.drafting import Speculation
from pagewire.decode_worker.frame_place import FramePlace
from pagewire.decode_worker.handoffs import Handoffs
from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.running_batch import RunningBatch
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.batch import Batch, StepResult
from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, Message
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageHasher
from pagewire.worker.attempts import Attempts
from pagewire.worker.cache_reports import CacheReports
from pagewire.worker.effects import Effect, Emit
from pagewire.worker.events import failed, page_counts
from pagewire.worker.identity import AttemptKey, CommandError, reply_route
from pagewire.worker.standstill import Standstill


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
        long the Reservation of one that has lost its sender is held for another attempt. At most
        `max_waiting_handoffs` wait for room, and one may: the youngest of more are refused.

        Without a `hasher` nothing is cached, without `speculation` nothing is drafted.
        """
        self.incarnation = incarnation
        self.layout = layout
        self.pool = pool
        self.cache = PrefixCache(pool)
        self.slots = slots
        self._reports = CacheReports(self.cache, incarnation)
        self._attach_reader = AttachReader(
            layout=layout,
            num_pages=pool.num_pages,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            hasher=hasher,
            speculation=speculation,
        )
        self._attempts: Attempts[DecodeRequest] = Attempts()
        self._batch = RunningBatch(
            attempts=self._attempts,
            pool=pool,
            cache=self.cache,
            layout=layout,
            hasher=hasher,
            speculation=speculation,
            max_batch_size=max_batch_size,
        )
        self._admission = Admission(
            pool=pool,
            cache=self.cache,
            page_size=layout.page_size,
            max_waiting=max_waiting_handoffs,
            lease_s=lease_s,
        )
        self._handoffs = Handoffs(
            attempts=self._attempts,
            admission=self._admission,
            batch=self._batch,
            pool=pool,
            cache=self.cache,
            slots=slots,
            layout=layout,
            vocab_size=vocab_size,
            slot_bytes=slot_bytes,
            max_slots_per_handoff=max_slots_per_handoff,
            closing_s=closing_s,
            renew_s=renew_s,
        )
        self._standstill = Standstill()
        self._num_dropped = 0  # commands and messages; the hand-offs count what they drop

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
        self._handoffs.drop_all_held(router)
        effects = [
            effect
            for request in self._attempts.sent_by(router)
            for effect in self._handoffs.end(request)
        ]
        return [*effects, *self._handoffs.admit_waiting()]

    def _on_attach(self, key: AttemptKey, command: pb.WorkerCommand, now: float) -> list[Effect]:
        if self._attempts.knows(key):
            self._num_dropped += 1
            return []
        try:
            request = self._attach_reader.read(command)
        except CommandError as error:
            self._attempts.rule_out(key)
            return [failed(command.route, str(error))]
        held = AttemptKey(key.request_id, command.attach.held_attempt)
        attached = pb.WorkerEvent(route=reply_route(command.route), attached=pb.Attached())
        return [*self._handoffs.expect(request, held, now), Emit(event=attached)]

    def _on_abort(self, key: AttemptKey, router: bytes) -> list[Effect]:
        request = self._attempts.get(key)
        if request is not None:
            return self._handoffs.end(request) if request.route.sender == router else []
        self._attempts.rule_out(key)
        return self._handoffs.drop_held(key, router)

    def _on_stop_choice(self, key: AttemptKey, command: pb.WorkerCommand) -> list[Effect]:
        request = self._attempts.get(key)
        if request is None or request.route.sender != command.route.sender:
            return []
        for sequence in list(request.sequences):
            if sequence.choice == command.stop_choice.choice:
                self._batch.end_choice(request, sequence)
        return self._handoffs.admit_waiting() if request.sequences else self._handoffs.end(request)

    # --- From the prefill worker ------------------------------------------------------------------

    def on_message(self, peer: bytes, message: Message, now: float) -> list[Effect]:
        """A message from the worker `peer` is complete; a Frame's payload lies in its slot."""
        if (message.id.sender, message.id.receiver) != (peer, self.incarnation):
            self._num_dropped += 1
            return []
        return self._handoffs.on_message(message, now)

    def place(
        self, peer: bytes, frame: Frame, length: int
    ) -> tuple[FramePlace | None, list[Effect]]:
        """Where the payload of `frame` may be written; None to discard it."""
        return self._handoffs.place(peer, frame, length)

    def on_scattered(self, frame: Frame, is_sound: bool, now: float) -> list[Effect]:
        """A Scatter or Verify is done: the bytes of `frame` are in pages, if they were sound."""
        return self._handoffs.on_scattered(frame, is_sound, now)

    def on_peer_lost(self, peer: bytes, now: float) -> list[Effect]:
        """A prefill worker is gone, or cannot be reached; nothing writes its slots any more."""
        return self._handoffs.on_peer_lost(peer, now)

    # --- The step loop ----------------------------------------------------------------------------

    def next_batch(self, now: float) -> tuple[Batch | None, list[Effect]]:
        """What the model runs next, once no step is out any more."""
        batch = self._batch.next_batch(now)
        return batch, [] if batch else self._handoffs.admit_waiting()

    def next_batch_ahead(self, now: float) -> Batch | None:
        """The step behind the one that runs, whose tokens are not known; None if it must wait."""
        return self._batch.next_batch_ahead(now)

    def drop_batch_ahead(self) -> None:
        """The step behind the one that runs, or has failed, is void, and nothing of it runs."""
        self._batch.drop_batch_ahead()

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        """The older of the steps that are out has run."""
        return [*self._batch.on_batch_done(result, now), *self._handoffs.admit_waiting()]

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        """The model raised because of `rows`: they fail, the rest of the batch runs again."""
        return [*self._batch.on_batch_failed(rows), *self._handoffs.admit_waiting()]

    # --- Time and state ---------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Time passes. That in which this process stood still does not count."""
        return self._handoffs.tick(now, self._standstill.on_tick(now))

    def report_cache(self, routers: Iterable[bytes]) -> list[Effect]:
        """Tell the routers, all that have a session, what has changed in the prefix cache."""
        return [*self._reports.report(routers)]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left: no attempt, no promise to one, no step, and no slot that a frame
        may still reach.
        """
        is_empty = not (len(self._attempts) or self._admission.num_held or self._batch.is_stepping)
        return is_empty and self.slots.num_free == self.slots.num_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the books balance."""
        self.pool.check_integrity()
        self.cache.check_integrity()
        self.slots.check_integrity()

    def state(self) -> pb.WorkerState:
        """Counts as of now."""
        num_waiting = self._handoffs.num_waiting
        return pb.WorkerState(
            pages=page_counts(self.pool),
            queued=num_waiting + self._batch.num_waiting,
            running=self._batch.num_running,
            handoffs=num_waiting + self._handoffs.num_receiving,
            generated_tokens=self._batch.num_generated_tokens,
            drafted_tokens=self._batch.num_drafted_tokens,
            accepted_tokens=self._batch.num_accepted_tokens,
            dropped_messages=self._num_dropped + self._handoffs.num_dropped,
        )
