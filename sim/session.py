"""One session between a router and a worker: commands down, events up, both in order."""

from functools import partial
from typing import Protocol

from pagewire.proto import worker_pb2 as pb
from pagewire.sim.channel import Channel
from pagewire.sim.environment import Environment
from pagewire.sim.process import Process
from pagewire.sim.timeline import Action


class RouterEnd(Protocol):
    """What a session needs of the router."""

    @property
    def process(self) -> Process: ...

    @property
    def incarnation(self) -> bytes: ...

    def on_event(self, session: "Session", event: pb.WorkerEvent) -> None: ...

    def on_session_ended(self, session: "Session") -> None: ...


class WorkerEnd(Protocol):
    """What a session needs of the worker."""

    @property
    def process(self) -> Process: ...

    @property
    def incarnation(self) -> bytes: ...

    def on_session_opened(self, session: "Session") -> None: ...

    def on_command(self, session: "Session", command: pb.WorkerCommand) -> None: ...

    def on_session_ended(self, session: "Session") -> None: ...


class Session:
    """Made by a router when a worker has registered; the worker learns of it by its Hello."""

    def __init__(self, environment: Environment, router: RouterEnd, worker: WorkerEnd) -> None:
        self.router = router
        self.worker = worker
        self._environment = environment
        self._down = Channel(environment, lambda faults: faults.session_messages)
        self._up = Channel(environment, lambda faults: faults.session_messages)
        self._is_lost = False
        self._noticed: set[Process] = set()  # ends that know of the loss

    def open(self) -> None:
        """Say Hello."""
        opened = partial(self.worker.on_session_opened, self)
        self._carry(self._down.ordered_arrival(), self.worker.process, opened)

    def send(self, command: pb.WorkerCommand) -> None:
        for at in [] if self._is_lost else self._down.arrivals():
            self._carry(at, self.worker.process, partial(self.worker.on_command, self, command))

    def emit(self, event: pb.WorkerEvent) -> None:
        for at in [] if self._is_lost else self._up.arrivals():
            self._carry(at, self.router.process, partial(self.router.on_event, self, event))

    def lose(self) -> None:
        """Its end, by a fault or because an end closes it; the other notices. Idempotent."""
        if self._is_lost:
            return
        self._is_lost = True
        for end in (self.router, self.worker):
            delay = self._environment.costs.notice.draw(self._environment.random)
            end.process.after(delay, partial(self._notice, end))

    def _notice(self, end: RouterEnd | WorkerEnd) -> None:
        self._noticed.add(end.process)
        end.on_session_ended(self)

    def _carry(self, at: float, receiver: Process, action: Action) -> None:
        """Let `receiver` act at `at`, unless it has noticed that the session is lost."""

        def arrive() -> None:
            if receiver not in self._noticed:
                action()

        self._environment.timeline.at(at, lambda: receiver.do(arrive))
