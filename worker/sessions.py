"""A worker's side of the control plane: it registers with routers and serves their sessions."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable

import grpc

from pagewire.proto import worker_pb2 as pb
from pagewire.proto import worker_pb2_grpc as pb_grpc

_RETRY_S = 0.5  # between attempts to register
_SESSION_TIMEOUT_S = 5.0  # for a router to open its session after a registration

logger = logging.getLogger(__name__)


class RegistrationRefused(Exception):
    """A router cannot use this worker as it was started; the text names the field."""


class RouterSession:
    """Events on their way to one router."""

    def __init__(self, router: bytes) -> None:
        self.router = router
        self.ended = asyncio.Event()
        self._events: list[pb.WorkerEvent] = []
        self._wake = asyncio.Event()

    def emit(self, event: pb.WorkerEvent) -> None:
        self._events.append(event)
        self._wake.set()

    def close(self) -> None:
        self.ended.set()
        self._wake.set()

    async def batches(self) -> AsyncIterator[pb.WorkerEvents]:
        """What has gathered since the last message, in one message, until the session ends."""
        while not self.ended.is_set():
            await self._wake.wait()
            self._wake.clear()
            if self._events:
                events, self._events = self._events, []
                yield pb.WorkerEvents(events=events)


class WorkerService(pb_grpc.WorkerServicer):
    """Serves sessions; hands commands and their end to the worker's shell."""

    def __init__(
        self,
        *,
        incarnation: bytes,
        on_command: Callable[[pb.WorkerCommand], None],
        on_session_lost: Callable[[bytes], None],
        inspect: Callable[[], pb.WorkerState],
    ) -> None:
        self._incarnation = incarnation
        self._on_command = on_command
        self._on_session_lost = on_session_lost
        self._inspect = inspect
        self._sessions: dict[bytes, RouterSession] = {}  # by incarnation of the router
        self._opened = asyncio.Condition()

    def emit(self, event: pb.WorkerEvent) -> None:
        """Queue an event for the router that `event.route.receiver` names, if it is still there."""
        session = self._sessions.get(event.route.receiver)
        if session is not None:
            session.emit(event)

    def heartbeat(self, state: pb.WorkerState) -> None:
        """Tell every router that this worker is alive, and how it is."""
        for router, session in self._sessions.items():
            route = pb.Route(sender=self._incarnation, receiver=router)
            session.emit(pb.WorkerEvent(route=route, heartbeat=state))

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    async def wait_opened(self, router: bytes) -> RouterSession:
        """The session of `router`, once it is open. Raises TimeoutError."""
        async with asyncio.timeout(_SESSION_TIMEOUT_S), self._opened:
            await self._opened.wait_for(lambda: router in self._sessions)
            return self._sessions[router]

    async def Session(
        self,
        request_iterator: AsyncIterator[pb.WorkerCommand],
        context: "grpc.aio.ServicerContext[pb.WorkerCommand, pb.WorkerEvents]",
    ) -> AsyncIterator[pb.WorkerEvents]:
        hello = await anext(aiter(request_iterator))
        if not hello.HasField("hello") or hello.route.receiver != self._incarnation:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "a session begins with Hello to the incarnation that registered",
            )
        session = await self._open(hello.route.sender)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            async for batch in session.batches():
                yield batch
        finally:
            reader.cancel()
            session.close()
            if self._sessions.get(session.router) is session:
                del self._sessions[session.router]
                self._on_session_lost(session.router)

    async def Inspect(
        self,
        request: pb.InspectRequest,
        context: "grpc.aio.ServicerContext[pb.InspectRequest, pb.WorkerState]",
    ) -> pb.WorkerState:
        return self._inspect()

    async def _open(self, router: bytes) -> RouterSession:
        previous = self._sessions.pop(router, None)
        if previous is not None:
            previous.close()
            self._on_session_lost(router)
        session = RouterSession(router)
        async with self._opened:
            self._sessions[router] = session
            self._opened.notify_all()
        return session

    async def _read(
        self, session: RouterSession, commands: AsyncIterator[pb.WorkerCommand]
    ) -> None:
        try:
            async for command in commands:
                if command.route.sender == session.router:
                    self._on_command(command)
        finally:
            session.close()


async def keep_registered(
    service: WorkerService, routers: Iterable[str], info: pb.RegisterRequest
) -> None:
    """Register with every router, again whenever its session ends. Runs until cancelled.

    Raises RegistrationRefused when a router says that it cannot use this worker.
    """
    await asyncio.gather(*(_keep_registered(service, router, info) for router in routers))


async def _keep_registered(service: WorkerService, router: str, info: pb.RegisterRequest) -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            identity = await _register(router, info)
            if identity is not None:
                session = await service.wait_opened(identity)
                logger.info("%s serves the router at %s", info.name, router)
                await session.ended.wait()
        await asyncio.sleep(_RETRY_S)


async def _register(router: str, info: pb.RegisterRequest) -> bytes | None:
    """The router's incarnation; None when it does not answer."""
    async with grpc.aio.insecure_channel(router) as channel:
        try:
            response = await pb_grpc.MembershipStub(channel).Register(info, timeout=5)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise RegistrationRefused(error.details() or "refused") from error
            return None
        return response.router
