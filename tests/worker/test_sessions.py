"""Events on their way to a router: gathered, bounded, in order."""

import asyncio
from collections.abc import AsyncIterator, Callable
from unittest.mock import Mock

from pagewire.proto import worker_pb2 as pb
from pagewire.worker.sessions import RouterSession, WorkerService

ROUTE = pb.Route(sender=b"r" * 16, receiver=b"w" * 16)
HELLO = pb.WorkerCommand(route=ROUTE, hello=pb.Hello())
STOP = pb.WorkerCommand(route=ROUTE, stop_choice=pb.StopChoice())
ATTACH = pb.WorkerCommand(route=ROUTE, attach=pb.Attach())


def event(number: int) -> pb.WorkerEvent:
    return pb.WorkerEvent(route=pb.Route(request_id=str(number)))


async def collect(session: RouterSession) -> list[list[str]]:
    return [[item.route.request_id for item in batch.events] async for batch in session.batches()]


def test_what_gathers_goes_out_together_in_messages_of_bounded_size() -> None:
    async def run() -> None:
        session = RouterSession(b"r" * 16)
        for number in range(2500):
            session.emit(event(number))
        batches = session.batches()
        sizes, seen = [], []
        for _ in range(3):
            batch = await anext(batches)
            sizes.append(len(batch.events))
            seen += [item.route.request_id for item in batch.events]
        assert sizes == [1024, 1024, 452]
        assert seen == [str(number) for number in range(2500)]

    asyncio.run(run())


def test_a_router_that_does_not_keep_up_loses_its_session() -> None:
    async def run() -> None:
        session = RouterSession(b"r" * 16)
        for number in range(65_537):
            session.emit(event(number))
        assert session.ended.is_set()
        assert await collect(session) == []

    asyncio.run(run())


async def received(queue: asyncio.Queue[pb.WorkerCommand]) -> AsyncIterator[pb.WorkerCommand]:
    while True:
        yield await queue.get()


def test_what_comes_late_over_a_session_that_was_replaced_is_dropped() -> None:
    """Its requests have ended with it: nobody would end one that began now."""
    taken: list[pb.WorkerCommand] = []
    lost: list[bytes] = []

    async def run() -> None:
        service = WorkerService(
            incarnation=ROUTE.receiver,
            on_command=taken.append,
            on_session_lost=lost.append,
            inspect=pb.WorkerState,
        )
        queues: list[asyncio.Queue[pb.WorkerCommand]] = [asyncio.Queue(), asyncio.Queue()]
        before, after = (service.Session(received(queue), Mock()) for queue in queues)
        queues[0].put_nowait(HELLO)
        first = asyncio.ensure_future(anext(before))
        await service.wait_opened(ROUTE.sender)
        service.heartbeat(pb.WorkerState())
        await first  # and the next message waits for the network
        queues[0].put_nowait(ATTACH)
        await until(lambda: bool(taken))
        queues[1].put_nowait(HELLO)
        second = asyncio.create_task(serve(after))
        await until(lambda: bool(lost))
        queues[0].put_nowait(ATTACH)
        queues[1].put_nowait(STOP)
        await until(lambda: STOP in taken)
        service.close()
        await second
        await serve(before)

    asyncio.run(run())
    assert taken == [ATTACH, STOP]


async def serve(batches: AsyncIterator[pb.WorkerEvents]) -> None:
    async for _ in batches:
        pass


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0)
