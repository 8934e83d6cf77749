"""A prefill and a decode core joined by two queues: every step of a hand-off at the test's word."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.drafting import Speculation
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.batch import Batch, StepResult
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, HandoffId, Message
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import KEY_BYTES, PageHasher
from pagewire.worker.effects import Connect, Effect, Emit, Scatter, Send, SendFrame, Verify

LAYOUT = KVLayout(page_size=16, num_layers=2, num_kv_heads=1, head_dim=1, dtype="float32")
ROUTER = b"r" * 16
PREFILL = b"p" * 16
DECODE = b"d" * 16
TICKET = b"t" * 16
HASHER = PageHasher(secret=bytes(KEY_BYTES), page_size=LAYOUT.page_size)
VOCAB_SIZE = 100
TOKEN = 7  # what the model samples, always

Step = Callable[[], None]


def route(
    receiver: bytes, request_id: str = "request", attempt: int = 1, sender: bytes = ROUTER
) -> pb.Route:
    return pb.Route(request_id=request_id, attempt=attempt, sender=sender, receiver=receiver)


def sampling(max_tokens: int = 3, stop_token_ids: Sequence[int] = ()) -> pb.SamplingParams:
    return pb.SamplingParams(max_tokens=max_tokens, top_p=1.0, stop_token_ids=stop_token_ids)


def step_result(batch: Batch, token: int = TOKEN) -> StepResult:
    """A step in which every row that samples gets `token`."""
    return StepResult(tokens=tuple((token,) * row.num_samples for row in batch.rows))


def prefill_command(
    prompt: Sequence[int],
    *,
    request_id: str = "request",
    attempt: int = 1,
    ticket: bytes = TICKET,
    params: pb.SamplingParams | None = None,
    n: int | None = None,
) -> pb.WorkerCommand:
    body = pb.Prefill(
        token_ids=prompt,
        sampling=params or sampling(),
        ticket=ticket,
        decode=DECODE,
        transports=[pb.TransportAddress(kind="local", address=b"here")],
        n=n,
    )
    return pb.WorkerCommand(route=route(PREFILL, request_id, attempt), prefill=body)


def attach_command(
    prompt: Sequence[int],
    *,
    request_id: str = "request",
    attempt: int = 1,
    ticket: bytes = TICKET,
    params: pb.SamplingParams | None = None,
    n: int | None = None,
) -> pb.WorkerCommand:
    body = pb.Attach(
        token_ids=prompt, sampling=params or sampling(), ticket=ticket, prefill=PREFILL, n=n
    )
    return pb.WorkerCommand(route=route(DECODE, request_id, attempt), attach=body)


def abort_command(
    receiver: bytes, request_id: str = "request", attempt: int = 1
) -> pb.WorkerCommand:
    return pb.WorkerCommand(
        route=route(receiver, request_id, attempt), abort=pb.Abort(reason="test")
    )


def stop_command(choice: int, request_id: str = "request") -> pb.WorkerCommand:
    return pb.WorkerCommand(
        route=route(DECODE, request_id), stop_choice=pb.StopChoice(choice=choice)
    )


def page_frame(
    page: int,
    *,
    request_id: str = "request",
    receiver: bytes = DECODE,
    prefix_hash: bytes = bytes(16),
) -> Frame:
    """All layers of one page, for the slot of the same number in its first generation."""
    return Frame(
        id=HandoffId(request_id=request_id, attempt=1, sender=PREFILL, receiver=receiver),
        seq=page,
        slot=page,
        slot_generation=0,
        first_page=page,
        num_pages=1,
        first_layer=0,
        num_layers=LAYOUT.num_layers,
        layout_digest=LAYOUT.digest(),
        prefix_hash=prefix_hash,
        checksum=0,
    )


def prefill_core(
    *,
    num_pages: int = 16,
    max_batch_tokens: int = 32,
    slot_bytes: int = LAYOUT.page_bytes,
    hasher: PageHasher | None = None,
    layout: KVLayout = LAYOUT,
    stream_layers: bool = True,
) -> PrefillCore:
    return PrefillCore(
        incarnation=PREFILL,
        layout=layout,
        pool=PagePool(num_pages),
        vocab_size=VOCAB_SIZE,
        max_model_len=256,
        max_batch_tokens=max_batch_tokens,
        slot_bytes=slot_bytes,
        hasher=hasher,
        stream_layers=stream_layers,
    )


def decode_core(
    *,
    num_pages: int = 16,
    num_slots: int = 3,
    max_batch_size: int = 4,
    slot_bytes: int = 4 * LAYOUT.page_bytes,
    hasher: PageHasher | None = None,
    speculation: Speculation | None = None,
    layout: KVLayout = LAYOUT,
    max_waiting_handoffs: int = 16,
) -> DecodeCore:
    return DecodeCore(
        incarnation=DECODE,
        layout=layout,
        pool=PagePool(num_pages),
        slots=SlotPool(num_slots),
        vocab_size=VOCAB_SIZE,
        max_model_len=256,
        max_batch_size=max_batch_size,
        slot_bytes=slot_bytes,
        hasher=hasher,
        speculation=speculation,
        max_waiting_handoffs=max_waiting_handoffs,
    )


def pass_time(core: PrefillCore | DecodeCore, now: float, until: float) -> list[Effect]:
    """Tick from `now` to `until`, as often as a shell does; what came of it."""
    effects: list[Effect] = []
    while now < until:
        effects += core.tick(now)
        now += 0.25
    return [*effects, *core.tick(until)]


class HandoffPair:
    """Does what the cores ask for, one step at a time; `steps` are those that are possible now."""

    def __init__(self, prefill: PrefillCore, decode: DecodeCore) -> None:
        self.prefill = prefill
        self.decode = decode
        self.to_decode: deque[Message] = deque()
        self.to_prefill: deque[Message] = deque()
        self.events: list[pb.WorkerEvent] = []
        self.sample: Callable[[Batch], StepResult] = step_result  # what the model gives
        self.bad_frames: set[int] = set()  # by seq: those that fail their checksum
        self._sending: deque[SendFrame] = deque()
        self._landing: deque[Frame] = deque()
        self._scattering: deque[Scatter | Verify] = deque()
        self._prefill_batch: Batch | None = None
        self._layer_group_ends: deque[int] = deque()  # of that batch, which it has not reported
        self._decode_batch: Batch | None = None
        self.runs_ahead = False  # decode steps begin before the one before has ended
        self._decode_batch_ahead: Batch | None = None  # behind the one that runs

    def steps(self) -> list[Step]:
        """What can happen now."""
        possible: list[tuple[object, Step]] = [
            (self.to_decode and not self._landing, self.deliver_to_decode),
            (self.to_prefill, self.deliver_to_prefill),
            (self._sending, self.finish_sending),
            (self._landing, self.finish_landing),
            (self._scattering, self.finish_scattering),
            (self._layer_group_ends, self.finish_layers),
            (True, self.step_prefill),
            (
                self.runs_ahead and self._decode_batch and not self._decode_batch_ahead,
                self.begin_decode_ahead,
            ),
            (True, self.step_decode),
        ]
        return [step for is_possible, step in possible if is_possible]

    def run(self) -> None:
        """Take steps until there is nothing to do."""
        is_over = False
        while not is_over:
            was_idle = self._is_idle()
            for step in self.steps():
                step()
            is_over = was_idle and self._is_idle()

    def lose_connection(self, first: bytes) -> None:
        """Both ends notice, `first` before the other; nothing that is under way arrives."""
        self.to_decode.clear()
        self.to_prefill.clear()
        self._landing.clear()
        for end in (PREFILL, DECODE) if first == PREFILL else (DECODE, PREFILL):
            if end == PREFILL:
                self.carry_out(self.prefill.on_peer_lost(DECODE, 0.0))
            else:
                self.carry_out(self.decode.on_peer_lost(PREFILL, 0.0))
        self.to_decode.clear()
        self.to_prefill.clear()

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Emit(event=event):
                    self.events.append(event)
                case Send(message=message):
                    is_to_decode = message.id.receiver == DECODE
                    (self.to_decode if is_to_decode else self.to_prefill).append(message)
                case SendFrame():
                    self._sending.append(effect)
                case Scatter() | Verify():
                    self._scattering.append(effect)
                case Connect():
                    pass

    def deliver_to_decode(self) -> None:
        message = self.to_decode.popleft()
        if not isinstance(message, Frame):
            self.carry_out(self.decode.on_message(message.id.sender, message, 0.0))
            return
        length = message.part.num_bytes(self.prefill.layout)
        place, effects = self.decode.place(message.id.sender, message, length)
        self.carry_out(effects)
        if place is not None:
            self._landing.append(message)

    def deliver_to_prefill(self) -> None:
        message = self.to_prefill.popleft()
        self.carry_out(self.prefill.on_message(message.id.sender, message, 0.0))

    def finish_sending(self) -> None:
        frame = self._sending.popleft().frame
        checksum = 1000 + frame.seq
        self.to_decode.append(replace(frame, checksum=checksum))
        self.carry_out(self.prefill.on_frame_sent(frame, checksum, 0.0))

    def finish_landing(self) -> None:
        frame = self._landing.popleft()
        self.carry_out(self.decode.on_message(frame.id.sender, frame, 0.0))

    def finish_scattering(self) -> None:
        frame = self._scattering.popleft().frame
        self.carry_out(self.decode.on_scattered(frame, frame.seq not in self.bad_frames, 0.0))

    def step_prefill(self) -> None:
        """End the step that runs, whether it has reported its layers or not, or begin one."""
        if self._prefill_batch is None:
            self._prefill_batch, effects = self.prefill.next_batch(0.0)
            if self._prefill_batch is not None:
                self._layer_group_ends.extend(self._prefill_batch.layer_group_ends)
        else:
            result = self.sample(self._prefill_batch)
            self._prefill_batch = None
            self._layer_group_ends.clear()
            effects = self.prefill.on_batch_done(result, 0.0)
        self.carry_out(effects)

    def finish_layers(self) -> None:
        """The prefill step that runs reports a group of layers."""
        self.carry_out(self.prefill.on_layers_done(self._layer_group_ends.popleft(), 0.0))

    def step_decode(self) -> None:
        """End the step that runs, or begin one."""
        if self._decode_batch is None:
            self._decode_batch, effects = self.decode.next_batch(0.0)
        else:
            result = self.sample(self._decode_batch)
            self._decode_batch, self._decode_batch_ahead = self._decode_batch_ahead, None
            effects = self.decode.on_batch_done(result, 0.0)
        self.carry_out(effects)

    def begin_decode_ahead(self) -> None:
        """Begin a step behind the one that runs, if there can be one."""
        self._decode_batch_ahead = self.decode.next_batch_ahead(0.0)

    def fail_decode_step(self, row: int) -> None:
        """The decode step that runs raises because of one of its rows."""
        assert self._decode_batch is not None
        if self._decode_batch_ahead is not None:
            self.decode.drop_batch_ahead()
        self._decode_batch, self._decode_batch_ahead = None, None
        self.carry_out(self.decode.on_batch_failed({row}))

    def running_batches(self) -> tuple[Batch | None, Batch | None]:
        """What the prefill and the decode worker compute now."""
        return self._prefill_batch, self._decode_batch

    def decode_batches(self) -> list[Batch]:
        """The decode steps that are out, the older first."""
        return [batch for batch in (self._decode_batch, self._decode_batch_ahead) if batch]

    def event_names(self) -> list[str | None]:
        return [event.WhichOneof("body") for event in self.events]

    def failures(self) -> "list[tuple[bytes, pb.FailureCode.ValueType]]":
        """Who has given up, or parked the prompt, and why."""
        return [
            (event.route.sender, getattr(event, str(event.WhichOneof("body"))).code)
            for event in self.events
            if event.HasField("failed") or event.HasField("parked")
        ]

    def abort(self, attempt: int = 1) -> None:
        """The router gives the request up, at both workers."""
        for core in (self.prefill, self.decode):
            command = abort_command(core.incarnation, attempt=attempt)
            self.carry_out(core.on_command(command, 0.0))
        self.run()

    def check_nothing_is_left(self) -> None:
        for core in (self.prefill, self.decode):
            core.check_integrity()
            assert core.pool.num_available == core.pool.num_pages
            assert core.is_idle
        assert not self.to_decode and not self.to_prefill

    def _is_idle(self) -> bool:
        return len(self.steps()) == 2 and not (self._prefill_batch or self._decode_batch)
