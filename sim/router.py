"""A router process under virtual time: `router.control` without its sockets."""

from collections.abc import Iterable

from pagewire.proto import worker_pb2 as pb
from pagewire.router.dispatch import DispatchCore
from pagewire.router.lifecycle import Deliver, Effect, Fail, SendCommand
from pagewire.router.request import Request, RequestFailed
from pagewire.sim.clients import Clients
from pagewire.sim.process import Process
from pagewire.sim.registration import RegisteringWorker
from pagewire.sim.session import Session

_TICK_S = 0.25


class SimRouter:
    """Feeds the real DispatchCore with clients' requests and workers' sessions."""

    def __init__(
        self, *, process: Process, max_queued: int, clients: Clients, page_secret: bytes
    ) -> None:
        self.process = process
        self._environment = process.environment
        self._clients = clients
        random = process.environment.random
        self.core = DispatchCore(
            incarnation=random.randbytes(16),
            max_queued=max_queued,
            make_ticket=lambda: random.randbytes(16),
            page_secret=page_secret,
        )
        self._sessions: dict[bytes, Session] = {}  # by incarnation of the worker

    @property
    def incarnation(self) -> bytes:
        return self.core.incarnation

    def start(self) -> None:
        self.process.after(_TICK_S, self._tick)

    def kill(self) -> None:
        """The process is gone; workers and clients will notice."""
        self.process.kill()
        for session in self._sessions.values():
            session.lose()
        self._clients.on_router_lost(self.process.name)

    # --- Clients ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        try:
            effects = self.core.submit(request, self.process.now)
        except RequestFailed as error:
            self._clients.on_refused(request.request_id, error)
        else:
            self._carry_out(effects)

    def cancel(self, request_id: str) -> None:
        self._clients.on_cancelled(request_id)
        self._carry_out(self.core.cancel(request_id, "the client is gone"))

    def stop_choice(self, request_id: str, choice: int) -> None:
        """The client has seen enough of one choice."""
        if self._clients.on_stopped(request_id, choice):
            self._carry_out(self.core.stop_choice(request_id, choice))

    # --- Workers ----------------------------------------------------------------------------------

    def register(self, worker: RegisteringWorker) -> None:
        """Take a worker in and open its session."""
        effects = self.core.on_registered(worker.registration_info(), self.process.now)
        known = self._sessions.pop(worker.incarnation, None)
        if known is not None:
            known.lose()
        session = self._sessions[worker.incarnation] = Session(self._environment, self, worker)
        session.open()
        self._carry_out(effects)
        self._close_sessions_of_the_lost()

    def on_event(self, session: Session, event: pb.WorkerEvent) -> None:
        if self._sessions.get(session.worker.incarnation) is session:
            if not event.HasField("heartbeat"):
                self._environment.note(self.process.name, f"heard {event.WhichOneof('body')}")
            self._carry_out(self.core.on_event(event, self.process.now))

    def on_session_ended(self, session: Session) -> None:
        if self._sessions.get(session.worker.incarnation) is session:
            del self._sessions[session.worker.incarnation]
            self._environment.note(self.process.name, f"lost {session.worker.process.name}")
            incarnation = session.worker.incarnation
            self._carry_out(self.core.on_worker_lost(incarnation, self.process.now))

    def _tick(self) -> None:
        self._carry_out(self.core.tick(self.process.now))
        self._close_sessions_of_the_lost()
        self.process.after(_TICK_S, self._tick)

    def _close_sessions_of_the_lost(self) -> None:
        for incarnation, session in list(self._sessions.items()):
            if self.core.members.get(incarnation) is None:
                del self._sessions[incarnation]
                session.lose()

    # --- Effects ----------------------------------------------------------------------------------

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendCommand(command=command):
                    session = self._sessions.get(command.route.receiver)
                    if session is not None:
                        session.send(command)
                case Deliver(request_id=request_id, update=update):
                    self._clients.on_update(request_id, update, self.process.now)
                case Fail(request_id=request_id, error=error):
                    self._clients.on_failed(request_id, error)
