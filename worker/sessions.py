"""A worker's side of the control plane: it registers with routers and serves their sessions."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

import grpc

from pagewire.proto import worker_pb2 as pb
from pagewire.proto import worker_pb2_grpc as pb_grpc
from pagewire.proto.channel import GRPC_OPTIONS

_RETRY_S = 0.5  # between attempts to register
_SESSION_TIMEOUT_S = 5.0  # for a router to open its session after a registration
_MAX_EVENTS_PER_MESSAGE = 1024  # far below gRPC's limit on the size of a message
_MAX_PENDING_EVENTS = 65_536  # a router so far behind is as good as gone

logger = logging.getLogger(__name__)


class RegistrationRefused(Exception):
    """A router cannot use this worker as it was started; the text names the field."""


class RouterUnreachable(Exception):
    """A router does not answer; it may later."""


class RouterSession:
    """Events on their way to one router."""

    def __init__(self, router: bytes) -> None:
        self.router = router
        self.ended = asyncio.Event()
        self._events: deque[pb.WorkerEvent] = deque()
        self._wake = asyncio.Event()

    def emit(self, event: pb.WorkerEvent) -> None:
        self._events.append(event)
        self._wake.set()
        if len(self._events) > _MAX_PENDING_EVENTS:
            logger.warning("a router does not keep up with its events; its session is closed")
            self.close()

    def close(self) -> None:
        self.ended.set()
        self._wake.set()

    async def batches(self) -> AsyncIterator[pb.WorkerEvents]:
        """What has gathered since the last message, in one message, until the session ends."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._events and not self.ended.is_set():
                size = min(len(self._events), _MAX_EVENTS_PER_MESSAGE)
                yield pb.WorkerEvents(events=[self._events.popleft() for _ in range(size)])
            if self.ended.is_set():
                return


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
        self._opened = asyncio.Event()  # set whenever a session opens

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

    @property
    def routers(self) -> list[bytes]:
        """Those that have a session now, by incarnation."""
        return list(self._sessions)

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    async def wait_opened(self, router: bytes) -> RouterSession:
        """The session of `router`, once it is open. Raises TimeoutError."""
        async with asyncio.timeout(_SESSION_TIMEOUT_S):
            while router not in self._sessions:
                self._opened.clear()
                await self._opened.wait()
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
        session = self._open(hello.route.sender)
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

    def _open(self, router: bytes) -> RouterSession:
        previous = self._sessions.pop(router, None)
        if previous is not None:
            previous.close()
            self._on_session_lost(router)
        session = self._sessions[router] = RouterSession(router)
        self._opened.set()
        return session

    async def _read(
        self, session: RouterSession, commands: AsyncIterator[pb.WorkerCommand]
    ) -> None:
        try:
            async for command in commands:
                if session.ended.is_set():  # and with it all that came over it
                    break
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
    complaint = ""
    while True:
        try:
            identity = await _register(router, info)
            session = await service.wait_opened(identity)
        except (RouterUnreachable, TimeoutError) as error:
            if complaint != (complaint := str(error) or "the router opened no session"):
                logger.warning("%s waits for the router at %s: %s", info.name, router, complaint)
        else:
            complaint = ""
            logger.info("%s serves the router at %s", info.name, router)
            await session.ended.wait()
        await asyncio.sleep(_RETRY_S)


async def _register(router: str, info: pb.RegisterRequest) -> bytes:
    """The router's incarnation. Raises RouterUnreachable and RegistrationRefused."""
    async with grpc.aio.insecure_channel(router, options=GRPC_OPTIONS) as channel:
        try:
            response = await pb_grpc.MembershipStub(channel).Register(info, timeout=5)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise RegistrationRefused(error.details() or "refused") from error
            raise RouterUnreachable(f"registration failed ({error.code().name})") from error
        return response.router
