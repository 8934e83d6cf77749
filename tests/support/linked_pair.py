"""A prefill and a decode core joined by real links over real transports, without a model.

Pages are filled with what position and layer say, so whoever decodes can tell wrong ones. Time is
virtual: it passes whenever the event loop has had some turns.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from handoff_pair import (
    DECODE,
    PREFILL,
    TICKET,
    VOCAB_SIZE,
    abort_command,
    attach_command,
    route,
    sampling,
    step_result,
)

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.circuit import CircuitLimits
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, decode
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.transport import Connection, Transport
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.connections import Connections
from pagewire.worker.effects import Connect, Disconnect, Effect, Emit, Send, SendFrame, Verify
from pagewire.worker.frame_reads import DirectReads
from pagewire.worker.frames import FrameReader, FrameWriter
from pagewire.worker.interval import Interval
from pagewire.worker.links import Links
from pagewire.worker.tasks import TaskSet

LAYOUT = KVLayout(page_size=16, num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32")
NUM_PAGES = 8
NUM_SLOTS = 3
PROMPT = range(40)  # 3 pages, in 2 chunks

KV_SHAPE = (LAYOUT.num_layers, LAYOUT.num_kv_heads, 2, LAYOUT.head_dim)
KV_VALUES = LAYOUT.num_layers * LAYOUT.num_kv_heads * 2 * LAYOUT.head_dim
PAGE_SHAPE = (LAYOUT.num_layers, LAYOUT.num_kv_heads, 2, LAYOUT.page_size, LAYOUT.head_dim)

_TURNS = 50  # of the event loop, for one tick
_TICK_S = 0.5  # of virtual time
_DEADLINE_S = 60.0  # when the router gives up, in virtual time
_HANG_S = 600.0

Pool = npt.NDArray[np.float32]
P = ParamSpec("P")
T = TypeVar("T")


class WrongPages(AssertionError):
    """A decode step was about to read KV that its sequence does not have."""


class InlineExecutor(Executor):
    """Runs what it gets at once, so that a busy machine cannot make virtual time pass."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Recorder:
    """A Transport that remembers the headers that it was given to send, in order."""

    def __init__(self, transport: Transport) -> None:
        self.kind = transport.kind
        self.stats = transport.stats
        self.sent: list[bytes] = []
        self._transport = transport

    @property
    def address(self) -> bytes:
        return self._transport.address

    async def start(self) -> None:
        await self._transport.start()

    def obstacle(self, address: bytes) -> str | None:
        return self._transport.obstacle(address)

    async def connect(self, peer: bytes, address: bytes) -> Connection:
        return RecordedConnection(await self._transport.connect(peer, address), self.sent)

    def connection(self, peer: bytes) -> Connection | None:
        found = self._transport.connection(peer)
        return None if found is None else RecordedConnection(found, self.sent)

    async def close(self) -> None:
        await self._transport.close()


class RecordedConnection:
    """One connection of a Recorder."""

    on_device = None

    def __init__(self, connection: Connection, sent: list[bytes]) -> None:
        self._connection = connection
        self._sent = sent

    @property
    def peer(self) -> bytes:
        return self._connection.peer

    async def send(self, header: bytes, *payload: memoryview) -> None:
        self._sent.append(header)
        await self._connection.send(header, *payload)

    def close(self) -> None:
        self._connection.close()


class LinkedWorker:
    """One core, its pages and its links: a worker's shell without model and routers."""

    def __init__(self, core: PrefillCore | DecodeCore, tasks: TaskSet) -> None:
        self.core = core
        self.events: list[pb.WorkerEvent] = []
        self.arrived: list[bytes] = []  # headers, of the frames that were not wanted, too
        self.now = 0.0
        self._tasks = tasks
        cache = KVCache(LAYOUT, NUM_PAGES)
        cache.pool.zero_()
        self._pool: Pool = np.frombuffer(cache.buffer(), np.float32).reshape(NUM_PAGES, *PAGE_SHAPE)
        self._writer = FrameWriter(cache, num_slots=NUM_SLOTS, slot_bytes=2 * LAYOUT.page_bytes)
        self._reader = FrameReader(LAYOUT, cache.buffer())
        self._batch: Batch | None = None
        self._layer_group_ends: list[int] = []  # of that batch, which it has not reported

    def start(
        self,
        transport: Recorder,
        *others: Transport,
        pairs: OneConnection | None = None,
        limits: CircuitLimits | None = None,
    ) -> None:
        self.transport = transport
        self._links = Links(
            transports=[transport, *others],
            pairs=pairs,
            reads=DirectReads(self._reader, thread=InlineExecutor(), clock=lambda: self.now),
            on_frame_sent=self._on_frame_sent,
            on_peer_lost=lambda peer: self.carry_out(self.core.on_peer_lost(peer, self.now)),
            has_handoff=self._has_handoff,
            spawn=self._tasks.spawn,
            clock=lambda: self.now,
            limits=limits,
            sleep=self._sleep,
        )

    @property
    def connections(self) -> Connections:
        return self._links.connections

    async def close(self) -> None:
        await self._links.close()

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Emit(event=event):
                    self.events.append(event)
                case Connect() | Send() | SendFrame():
                    self._links.put(effect)
                case Disconnect(peer=peer):
                    self._links.disconnect(peer)
                case Verify():
                    assert isinstance(self.core, DecodeCore)
                    is_sound = self._writer.is_sound(effect.frame)
                    self.carry_out(self.core.on_scattered(effect.frame, is_sound, self.now))

    def step(self) -> None:
        """Begin a step, go on with it layer by layer, or end it; a core never learns that there is
        no model.
        """
        if self._batch is None:
            self._batch, effects = self.core.next_batch(self.now)
            self._layer_group_ends = [*self._batch.layer_group_ends] if self._batch else []
        elif self._layer_group_ends:
            assert isinstance(self.core, PrefillCore)
            num_layers = self._layer_group_ends.pop(0)
            for row in self._batch.rows:
                self._compute(row, num_layers)
            effects = self.core.on_layers_done(num_layers, self.now)
        else:
            for row in self._batch.rows:
                self._compute(row, LAYOUT.num_layers)
            result = step_result(self._batch)
            self._batch = None
            effects = self.core.on_batch_done(result, self.now)
        self.carry_out(effects)

    def tick(self, now: float) -> None:
        self.now = now
        self.carry_out(self.core.tick(now))
        self.connections.improve()
        self.core.check_integrity()

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        self.arrived.append(header)
        frame = decode(header)
        assert isinstance(frame, Frame) and isinstance(self.core, DecodeCore)
        place, effects = self.core.place(peer, frame, length)
        self.carry_out(effects)
        if place is None:
            return None
        assert place.page_table is not None, "both workers have one layout"
        return self._writer.land_in_pages(frame, place.page_table)

    def deliver(self, peer: bytes, header: bytes) -> None:
        message = decode(header)
        if not isinstance(message, Frame):
            self.arrived.append(header)
        with self._tasks:
            self.carry_out(self.core.on_message(peer, message, self.now))

    def lost(self, peer: bytes, reason: str) -> None:
        with self._tasks:
            effects = self.core.on_peer_lost(peer, self.now)
            self._links.drop(peer)
            self.carry_out(effects)

    def _has_handoff(self, peer: bytes) -> bool:
        return isinstance(self.core, DecodeCore) or self.core.has_handoff(peer)

    async def _sleep(self, seconds: float) -> None:
        """Until virtual time has passed."""
        end = self.now + seconds
        while self.now < end:
            await asyncio.sleep(0)

    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        assert isinstance(self.core, PrefillCore)
        self.carry_out(self.core.on_frame_sent(frame, checksum, self.now, gathered))

    def _compute(self, row: BatchRow, num_layers: int) -> None:
        """Check the KV before the row's tokens, and write theirs in the first layers."""
        for position in range(row.start + len(row.token_ids)):
            page = row.page_table[position // LAYOUT.page_size]
            found = self._pool[
                page, :, :, :, position % LAYOUT.page_size
            ]  # [layer, head, K|V, dim]
            if position >= row.start:
                found[:num_layers] = kv_of(position)[:num_layers]
            elif not np.array_equal(found, kv_of(position)):
                raise WrongPages(f"position {position} in page {page}")


class LinkedPair:
    """A hand-off of PROMPT from `prefill` to `decode`, and the router above them."""

    def __init__(self, tasks: TaskSet) -> None:
        self.prefill = LinkedWorker(
            PrefillCore(
                incarnation=PREFILL,
                layout=LAYOUT,
                pool=PagePool(NUM_PAGES),
                vocab_size=VOCAB_SIZE,
                max_model_len=256,
                max_batch_tokens=32,
                slot_bytes=LAYOUT.page_bytes,
            ),
            tasks,
        )
        self.decode = LinkedWorker(
            DecodeCore(
                incarnation=DECODE,
                layout=LAYOUT,
                pool=PagePool(NUM_PAGES),
                slots=SlotPool(NUM_SLOTS),
                vocab_size=VOCAB_SIZE,
                max_model_len=256,
                max_batch_size=4,
                slot_bytes=2 * LAYOUT.page_bytes,
            ),
            tasks,
        )
        self._workers = (self.prefill, self.decode)
        self._num_requests = 0
        self.now = 0.0
        self.was_aborted = False

    @property
    def events(self) -> list[pb.WorkerEvent]:
        return [*self.prefill.events, *self.decode.events]

    @property
    def failures(self) -> "list[pb.FailureCode.ValueType]":
        return [event.failed.code for event in self.events if event.HasField("failed")]

    @property
    def has_finished(self) -> bool:
        """Whether the decode worker has generated every token."""
        tokens = [event.tokens for event in self.decode.events if event.HasField("tokens")]
        return any(item.finish_reason for item in tokens)

    async def run(self, *addresses: tuple[str, bytes]) -> None:
        """Hand over, as seen by workers that connect over one of `addresses`, until all is over.

        Raises WrongPages, and TimeoutError when something never ends.
        """
        self._begin(addresses)
        began = self.now
        while not (self.prefill.core.is_idle and self.decode.core.is_idle):
            if self.now > began + _HANG_S:
                raise TimeoutError(f"not over after {self.now - began:.0f} virtual seconds")
            await self.pass_time(_TICK_S)
            if self.failures or self.now > began + _DEADLINE_S:
                self._abort()

    async def pass_time(self, seconds: float) -> None:
        """Let both workers do what they have to do, for so long in virtual time."""
        end = self.now + seconds
        while self.now < end:
            for _ in range(_TURNS):
                for worker in self._workers:
                    worker.step()
                await asyncio.sleep(0)
            # Threads resolve addresses: virtual time passes no faster than one gets its turn.
            await asyncio.to_thread(lambda: None)
            self.now += _TICK_S
            for worker in self._workers:
                worker.tick(self.now)

    @property
    def _request_id(self) -> str:
        return f"request {self._num_requests}"

    def _begin(self, addresses: tuple[tuple[str, bytes], ...]) -> None:
        self._num_requests += 1
        self.was_aborted = False
        for worker in self._workers:
            worker.events.clear()
        attach = attach_command(PROMPT, request_id=self._request_id)
        prefill = pb.Prefill(
            token_ids=PROMPT,
            sampling=sampling(),
            ticket=TICKET,
            decode=DECODE,
            transports=[pb.TransportAddress(kind=kind, address=where) for kind, where in addresses],
        )
        command = pb.WorkerCommand(route=route(PREFILL, self._request_id), prefill=prefill)
        self.decode.carry_out(self.decode.core.on_command(attach, self.now))
        self.prefill.carry_out(self.prefill.core.on_command(command, self.now))

    def _abort(self) -> None:
        """What a router does after a failure or at the request's deadline, once."""
        if not self.was_aborted:
            self.was_aborted = True
            for worker, name in ((self.prefill, PREFILL), (self.decode, DECODE)):
                abort = abort_command(name, self._request_id)
                worker.carry_out(worker.core.on_command(abort, worker.now))


def kv_of(position: int) -> Pool:
    """What the KV cache has at a position: [layer, head, K|V, head_dim], all values distinct."""
    return np.arange(KV_VALUES, dtype=np.float32).reshape(KV_SHAPE) + position * KV_VALUES
