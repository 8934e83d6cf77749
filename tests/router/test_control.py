"""RouterControl against workers that do not do what they should."""

import asyncio
from collections.abc import AsyncIterator

import grpc
from routing import registration

from pagewire.proto import worker_pb2 as pb
from pagewire.proto import worker_pb2_grpc as pb_grpc
from pagewire.router.control import RouterControl

TIMEOUT_S = 20.0


class HungWorker(pb_grpc.WorkerServicer):
    """Takes a session and every question, and says nothing."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def Session(
        self,
        request_iterator: AsyncIterator[pb.WorkerCommand],
        context: "grpc.aio.ServicerContext[pb.WorkerCommand, pb.WorkerEvents]",
    ) -> AsyncIterator[pb.WorkerEvents]:
        await asyncio.Event().wait()
        yield pb.WorkerEvents()

    async def Inspect(
        self,
        request: pb.InspectRequest,
        context: "grpc.aio.ServicerContext[pb.InspectRequest, pb.WorkerState]",
    ) -> pb.WorkerState:
        self.asked.set()
        await asyncio.Event().wait()
        return pb.WorkerState()


async def play() -> None:
    worker = HungWorker()
    server = grpc.aio.server()
    pb_grpc.add_WorkerServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    control = RouterControl()
    await control.start()
    try:
        first, second = (
            registration("decode-0", pb.ROLE_DECODE, incarnation=each * 16) for each in (b"1", b"2")
        )
        first.address = second.address = f"127.0.0.1:{port}"
        control.register(first)
        asked = asyncio.create_task(worker.asked.wait())
        while not asked.done():  # until its session is open nobody can ask it
            inspecting = asyncio.create_task(control.inspect())
            await asyncio.wait({asked, inspecting}, return_when=asyncio.FIRST_COMPLETED)
        control.register(second)  # ends the session of the first, and the question with it
        (view,) = await inspecting
        assert not view.is_responding
        pid = second.pid
        assert control.step_s("decode-0", pid) == 0.0
        assert control.step_s("decode-1", pid) is None
        assert control.step_s("decode-0", pid + 1) is None  # that of its successor
        route = pb.Route(sender=second.incarnation, receiver=control.incarnation)
        control.on_event(pb.WorkerEvent(route=route, heartbeat=pb.WorkerState(step_s=2.5)))
        assert control.step_s("decode-0", pid) == 2.5
    finally:
        await control.stop()
        await server.stop(None)


def test_a_worker_may_be_given_up_while_it_is_looked_at() -> None:
    asyncio.run(asyncio.wait_for(play(), TIMEOUT_S))
