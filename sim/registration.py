"""A worker keeps itself registered with one router: `worker.sessions` under virtual time."""

from typing import Protocol

from pagewire.proto import worker_pb2 as pb
from pagewire.sim.session import RouterEnd, Session, WorkerEnd

_RETRY_S = 0.5
_SESSION_TIMEOUT_S = 5.0


class RegisteringWorker(WorkerEnd, Protocol):
    """What a registration needs of its worker."""

    def registration_info(self) -> pb.RegisterRequest: ...


class RegistrationRouter(RouterEnd, Protocol):
    """What a registration needs of a router."""

    def register(self, worker: RegisteringWorker) -> None: ...


class RegistrationDesk(Protocol):
    """One address at which a router serves, now this process and then its successor."""

    def router(self) -> RegistrationRouter:
        """The process there, dead or alive."""


class Registration:
    """Registers again whenever the session has ended, or has not come."""

    def __init__(self, worker: RegisteringWorker, desk: RegistrationDesk) -> None:
        self._worker = worker
        self._desk = desk
        self._session: Session | None = None
        self._num_attempts = 0

    def start(self) -> None:
        """Knock; if no session comes, knock again."""
        self._num_attempts += 1
        attempt = self._num_attempts
        process = self._worker.process
        environment = process.environment
        router = self._desk.router()
        latency = environment.costs.latency.draw(environment.random)
        router.process.after(latency, lambda: router.register(self._worker))
        patience = _SESSION_TIMEOUT_S if router.process.is_alive else _RETRY_S
        process.after(patience, lambda: self._start_unless_done(attempt))

    def on_session_opened(self, session: Session) -> None:
        if session.router is self._desk.router():
            self._session = session

    def on_session_ended(self, session: Session) -> None:
        if self._session is session:
            self._session = None
            self._worker.process.after(_RETRY_S, self.start)

    def _start_unless_done(self, attempt: int) -> None:
        if self._session is None and attempt == self._num_attempts:
            self.start()
