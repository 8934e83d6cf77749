"""The router's side of the control plane: registration, one session per worker, and a clock.

A thin shell around DispatchCore. It turns messages, broken sessions and time into events of the
core and carries the core's effects out.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

import grpc

from pagewire.proto import worker_pb2 as pb
from pagewire.proto import worker_pb2_grpc as pb_grpc
from pagewire.proto.channel import GRPC_OPTIONS
from pagewire.router.dispatch import DispatchCore
from pagewire.router.lifecycle import Deliver, Effect, Fail, SendCommand
from pagewire.router.members import Member, RegistrationRefused
from pagewire.router.request import Request, RequestFailed, TokenUpdate, WorkerView

_TICK_S = 0.25
_INSPECT_TIMEOUT_S = 1.0
_ROLE_NAMES = {pb.ROLE_PREFILL: "prefill", pb.ROLE_DECODE: "decode"}

logger = logging.getLogger(__name__)


class RouterControl:
    """Implements Dispatcher. Start it before the workers, stop it after the HTTP server."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_queued: int = 1024,
        page_secret: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._port = port
        self._clock = clock
        self._core = DispatchCore(
            incarnation=secrets.token_bytes(16),
            max_queued=max_queued,
            make_ticket=lambda: secrets.token_bytes(16),
            page_secret=page_secret,
        )
        self._sessions: dict[bytes, _Session] = {}  # by incarnation of the worker
        self._streams: dict[str, _ControlStream] = {}  # by request id
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def incarnation(self) -> bytes:
        return self._core.incarnation

    async def start(self) -> str:
        """Serve Membership; returns its host:port. Raises OSError when the port is taken."""
        self._server = grpc.aio.server(options=GRPC_OPTIONS)
        pb_grpc.add_MembershipServicer_to_server(_Membership(self), self._server)
        try:
            port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise OSError(
                f"cannot listen for workers on {self._host}:{self._port}; choose another port"
            ) from error
        await self._server.start()
        self._ticker = self.watch(asyncio.create_task(self._tick()))
        return f"{self._host}:{port}"

    async def stop(self) -> None:
        """End every session and stop serving."""
        if self._ticker is not None:
            self._ticker.cancel()
        sessions = list(self._sessions.values())
        self._sessions.clear()  # none of them is lost, all are left
        for session in sessions:
            session.close()
        await asyncio.gather(*(session.task for session in sessions), return_exceptions=True)
        if self._server is not None:
            await self._server.stop(grace=None)
        self._failed.cancel()

    def refuse_all(self) -> None:
        """The router is about to stop: fail every request, take no more."""
        self._carry_out(self._core.refuse_all())

    async def failure(self) -> None:
        """Wait until a background task fails, and raise what it raised: the books are wrong."""
        await asyncio.shield(self._failed)

    def watch(self, task: "asyncio.Task[None]") -> "asyncio.Task[None]":
        """Let a failure of `task` be the failure of the router."""
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)

    # --- Dispatcher -------------------------------------------------------------------------------

    def submit(self, request: Request) -> "_ControlStream":
        stream = _ControlStream(self, request.request_id)
        self._streams[request.request_id] = stream
        try:
            effects = self._core.submit(request, self._clock())
        except RequestFailed:
            del self._streams[request.request_id]
            raise
        self._carry_out(effects)
        return stream

    def cancel(self, request_id: str, reason: str) -> None:
        self._streams.pop(request_id, None)
        self._carry_out(self._core.cancel(request_id, reason))

    def stop_choice(self, request_id: str, choice: int) -> None:
        self._carry_out(self._core.stop_choice(request_id, choice))

    def check_ready(self) -> None:
        self._core.check_ready()

    def counts(self) -> Mapping[str, int]:
        return self._core.counts()

    def retries(self) -> Mapping[str, int]:
        return self._core.retries

    def max_kv_tokens(self, *, num_prompt_tokens: int = 0, n: int = 1) -> int:
        return self._core.max_kv_tokens(num_prompt_tokens=num_prompt_tokens, n=n)

    def max_model_len(self) -> int:
        """Tokens, prompt plus output, that every registered worker takes; 0 without any."""
        return min((member.info.max_model_len for member in self._core.members), default=0)

    def step_s(self, name: str, pid: int) -> float | None:
        """For how many seconds a worker has been at its step; 0 between steps.

        None when no worker of this name is registered and was heard lately. One whose process has
        another id is its predecessor, of whose end no session has told yet.
        """
        member = self._core.members.named(name)
        if member is None or member.info.pid != pid:
            return None
        return member.state.step_s

    async def inspect(self) -> list[WorkerView]:
        members = sorted(self._core.members, key=lambda member: member.info.name)
        return list(await asyncio.gather(*(self._inspect(member) for member in members)))

    async def _inspect(self, member: Member) -> WorkerView:
        session = self._sessions.get(member.incarnation)
        state = await session.inspect() if session is not None else None
        return WorkerView(
            name=member.info.name,
            role=_ROLE_NAMES[member.info.role],
            pid=member.info.pid,
            incarnation=member.incarnation.hex(),
            device=member.info.device,
            address=member.info.address,
            is_responding=state is not None,
            state=member.state if state is None else state,
        )

    # --- Workers ----------------------------------------------------------------------------------

    def register(self, info: pb.RegisterRequest) -> None:
        """Take a worker in and open its session. Raises RegistrationRefused."""
        effects = self._core.on_registered(info, self._clock())
        known = self._sessions.pop(info.incarnation, None)
        if known is not None:
            known.close()
        # Before the effects: what waited for this worker is among them.
        self._sessions[info.incarnation] = _Session(self, info)
        self._carry_out(effects)
        self._close_sessions_of_the_lost()
        logger.info("%s joined from %s", info.name, info.address)

    def on_event(self, event: pb.WorkerEvent) -> None:
        self._carry_out(self._core.on_event(event, self._clock()))

    def on_session_ended(self, session: "_Session", reason: str) -> None:
        """A session is over, and with it the worker, unless it was replaced by a newer one."""
        if self._sessions.get(session.info.incarnation) is session:
            del self._sessions[session.info.incarnation]
            logger.warning("lost %s: %s", session.info.name, reason)
            self._carry_out(self._core.on_worker_lost(session.info.incarnation, self._clock()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._carry_out(self._core.tick(self._clock()))
            self._close_sessions_of_the_lost()

    def _close_sessions_of_the_lost(self) -> None:
        for incarnation, session in list(self._sessions.items()):
            if self._core.members.get(incarnation) is None:
                del self._sessions[incarnation]
                session.close()
                logger.warning("gave up on %s", session.info.name)

    # --- Effects ----------------------------------------------------------------------------------

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendCommand(command=command):
                    session = self._sessions.get(command.route.receiver)
                    if session is not None:
                        session.send(command)
                case Deliver(request_id=request_id, update=update, is_last=is_last):
                    stream = self._streams.get(request_id)
                    if stream is not None:
                        stream.put(update)
                        if is_last:
                            stream.put(None)
                            del self._streams[request_id]
                case Fail(request_id=request_id, error=error):
                    stream = self._streams.pop(request_id, None)
                    if stream is not None:
                        stream.put(error)


class _ControlStream:
    """Implements Stream over a queue that the control shell fills."""

    def __init__(self, control: RouterControl, request_id: str) -> None:
        self._control = control
        self._request_id = request_id
        self._updates: asyncio.Queue[TokenUpdate | RequestFailed | None] = asyncio.Queue()

    def put(self, update: TokenUpdate | RequestFailed | None) -> None:
        """None after the last update."""
        self._updates.put_nowait(update)

    async def __aiter__(self) -> AsyncIterator[TokenUpdate]:
        while (update := await self._updates.get()) is not None:
            if isinstance(update, RequestFailed):
                raise update
            yield update

    def stop_choice(self, choice: int) -> None:
        self._control.stop_choice(self._request_id, choice)

    def cancel(self, reason: str) -> None:
        self._control.cancel(self._request_id, reason)


class _Session:
    """One worker's session: commands down, events up; its end is the end of the worker."""

    def __init__(self, control: RouterControl, info: pb.RegisterRequest) -> None:
        self.info = info
        self._control = control
        self._commands: asyncio.Queue[pb.WorkerCommand] = asyncio.Queue()
        self._stub: pb_grpc.WorkerAsyncStub | None = None
        hello = pb.Route(sender=control.incarnation, receiver=info.incarnation)
        self.send(pb.WorkerCommand(route=hello, hello=pb.Hello()))
        self.task = control.watch(asyncio.create_task(self._run()))

    def send(self, command: pb.WorkerCommand) -> None:
        self._commands.put_nowait(command)

    def close(self) -> None:
        self.task.cancel()

    async def inspect(self) -> pb.WorkerState | None:
        """The worker's state as of now; None when it does not answer."""
        if self._stub is None:
            return None
        try:
            return await self._stub.Inspect(pb.InspectRequest(), timeout=_INSPECT_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # the call alone was cancelled: its session has ended meanwhile

    async def _run(self) -> None:
        reason = "the session ended"
        try:
            async with grpc.aio.insecure_channel(
                self.info.address, options=GRPC_OPTIONS
            ) as channel:
                self._stub = pb_grpc.WorkerStub(channel)
                async for batch in self._stub.Session(self._outgoing()):
                    for event in batch.events:
                        self._control.on_event(event)
        except grpc.aio.AioRpcError as error:
            reason = f"the session broke ({error.code().name})"
        finally:
            self._control.on_session_ended(self, reason)

    async def _outgoing(self) -> AsyncIterator[pb.WorkerCommand]:
        while True:
            yield await self._commands.get()


class _Membership(pb_grpc.MembershipServicer):
    """The gRPC face of RouterControl.register."""

    def __init__(self, control: RouterControl) -> None:
        self._control = control

    async def Register(
        self,
        request: pb.RegisterRequest,
        context: "grpc.aio.ServicerContext[pb.RegisterRequest, pb.RegisterResponse]",
    ) -> pb.RegisterResponse:
        try:
            self._control.register(request)
        except RegistrationRefused as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.RegisterResponse(router=self._control.incarnation)
