"""Events on their way to a router: gathered, bounded, in order."""

import asyncio

from pagewire.proto import worker_pb2 as pb
from pagewire.worker.sessions import RouterSession


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
