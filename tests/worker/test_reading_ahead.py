"""The checksum of a frame is made while those before it are being sent; pages outlast that."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from handoff_pair import DECODE, LAYOUT, page_frame

from pagewire.kv_transfer.messages import Frame
from pagewire.kv_transfer.transport import Connection, TransferStats
from pagewire.worker.effects import SendFrame
from pagewire.worker.frame_reads import DirectReads
from pagewire.worker.frames import FrameReader
from pagewire.worker.interval import Interval
from pagewire.worker.links import Links
from pagewire.worker.tasks import TaskSet

P = ParamSpec("P")
T = TypeVar("T")
_TURNS = 20  # of the event loop: enough for everything that can happen


class HeldBackExecutor(Executor):
    """Runs a call when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        self.calls.append(lambda: done.set_result(fn(*args, **kwargs)))
        return done


class SlowConnection:
    """Counts what is sent; no send ends before the test lets it."""

    peer = DECODE
    on_device = None

    def __init__(self) -> None:
        self.num_begun = 0
        self.may_end = asyncio.Event()

    async def send(self, header: bytes, *payload: memoryview) -> None:
        self.num_begun += 1
        await self.may_end.wait()

    def close(self) -> None:
        raise AssertionError


class OneConnection:
    """A Transport with one connection."""

    kind = "test"
    address = b""

    def __init__(self) -> None:
        self.stats = TransferStats()
        self.only = SlowConnection()

    async def start(self) -> None:
        raise AssertionError

    def obstacle(self, address: bytes) -> str | None:
        raise AssertionError

    async def connect(self, peer: bytes, address: bytes) -> Connection:
        raise AssertionError

    def connection(self, peer: bytes) -> Connection | None:
        return self.only

    async def close(self) -> None:
        raise AssertionError


class Stage:
    """Links over one connection, with two frames to send."""

    def __init__(self) -> None:
        self.tasks = TaskSet()
        self.transport = OneConnection()
        self.thread = HeldBackExecutor()
        self.sent: list[tuple[int, bool]] = []  # seq, and whether it was sent
        pool = memoryview(bytearray(2 * LAYOUT.page_bytes))
        self.links = Links(
            transports=[self.transport],
            reads=DirectReads(FrameReader(LAYOUT, pool), thread=self.thread, clock=lambda: 0.0),
            on_frame_sent=self._on_frame_sent,
            on_peer_lost=lambda peer: None,
            spawn=self.tasks.spawn,
            clock=lambda: 0.0,
        )
        for seq in range(2):
            self.links.put(SendFrame(frame=page_frame(seq), page_table=(0, 1)))

    def _on_frame_sent(self, item: Frame, checksum: int | None, gathered: Interval | None) -> None:
        self.sent.append((item.seq, checksum is not None))

    async def go_on(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)


def run(scenario: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    async def staged() -> None:
        stage = Stage()
        await scenario(stage)
        await stage.tasks.cancel()

    asyncio.run(staged())


def test_the_next_frame_is_read_while_one_is_being_sent() -> None:
    async def scenario(stage: Stage) -> None:
        assert len(stage.thread.calls) == 2
        stage.thread.calls[0]()
        await stage.go_on()
        assert stage.transport.only.num_begun == 1
        stage.thread.calls[1]()
        stage.transport.only.may_end.set()
        await stage.go_on()
        assert stage.sent == [(0, True), (1, True)]

    run(scenario)


def test_the_pages_of_a_frame_that_is_dropped_are_let_go_once_they_are_read() -> None:
    async def scenario(stage: Stage) -> None:
        stage.thread.calls[0]()
        await stage.go_on()
        stage.links.drop(DECODE)
        await stage.go_on()
        assert stage.sent == []
        stage.thread.calls[1]()
        await stage.go_on()
        assert stage.sent == [(1, False)]
        stage.transport.only.may_end.set()
        await stage.go_on()
        assert stage.sent == [(1, False), (0, True)]

    run(scenario)
