"""A worker process under virtual time: `worker.shell` and `worker.sessions` without their sockets.

It feeds the real core and does what it says, in the same order and with the same guarantees.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from pagewire.engine.batch import Batch, with_known_tokens
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.messages import Frame, decode
from pagewire.proto import worker_pb2 as pb
from pagewire.sim.kv_memory import LAYOUT, KvMemory
from pagewire.sim.model import SimModel
from pagewire.sim.outbox import Outbox
from pagewire.sim.process import Process
from pagewire.sim.registration import Registration, RegistrationDesk
from pagewire.sim.session import Session
from pagewire.sim.transport import Fabric, SimHandler, SimTransport
from pagewire.worker.core import WorkerCore
from pagewire.worker.effects import (
    Connect,
    Disconnect,
    Effect,
    Emit,
    Scatter,
    Send,
    SendFrame,
    Verify,
)
from pagewire.worker.interval import Interval

_HEARTBEAT_S = 1.0
_TICK_S = 0.25
MODEL_NAME = "sim"
TRANSPORT_KIND = "sim"


class SimCore(WorkerCore, Protocol):
    """What a simulation wants to know beyond what the shell does."""

    pool: PagePool


Core = TypeVar("Core", bound=SimCore)


class SimWorker(SimHandler, Generic[Core]):
    """What both kinds of worker share."""

    role: "pb.Role.ValueType"

    def __init__(
        self,
        *,
        process: Process,
        core: Core,
        max_model_len: int,
        fabric: Fabric,
        routers: Sequence[RegistrationDesk],
        runs_ahead: bool = False,
    ) -> None:
        """With `runs_ahead` a step is launched before the one before it has ended."""
        self.process = process
        self.core = core
        self.memory = KvMemory(core.pool.num_pages)
        self.transport = SimTransport(
            process=process, incarnation=core.incarnation, fabric=fabric, handler=self
        )
        self.sessions: dict[bytes, Session] = {}  # by incarnation of the router
        self._max_model_len = max_model_len
        self._environment = process.environment
        self._model = SimModel(self.memory)
        self._is_stepping = False
        self._runs_ahead = runs_ahead
        self._ahead: Batch | None = None  # launched behind the step that runs
        self._outbox = Outbox(
            process=process,
            transport=self.transport,
            memory=self.memory,
            on_frame_sent=self._on_frame_sent,
            on_unreachable=self._on_unreachable,
        )
        self._registrations = [Registration(self, router) for router in routers]

    @property
    def incarnation(self) -> bytes:
        return self.core.incarnation

    def start(self) -> None:
        """Register with every router, and let time pass."""
        for registration in self._registrations:
            registration.start()
        self.process.after(0.0, self._beat)
        self.process.after(_TICK_S, self._tick)

    def kill(self) -> None:
        """The process is gone; those at the other ends will notice."""
        self.process.kill()
        for connection in self.transport.connections:
            connection.lose()
        for session in self.sessions.values():
            session.lose()
        self.transport.leave()

    def registration_info(self) -> pb.RegisterRequest:
        return pb.RegisterRequest(
            name=self.process.name,
            role=self.role,
            incarnation=self.incarnation,
            model=MODEL_NAME,
            max_model_len=self._max_model_len,
            num_pages=self.core.pool.num_pages,
            layout=pb.KVLayout(
                page_size=LAYOUT.page_size,
                num_layers=LAYOUT.num_layers,
                num_kv_heads=LAYOUT.num_kv_heads,
                head_dim=LAYOUT.head_dim,
                dtype=LAYOUT.dtype,
            ),
            transports=[pb.TransportAddress(kind=TRANSPORT_KIND)],
        )

    # --- Effects ----------------------------------------------------------------------------------

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the core asks for, in order, and let it go on."""
        for effect in effects:
            match effect:
                case Emit(event=event):
                    session = self.sessions.get(event.route.receiver)
                    if session is not None:
                        session.emit(event)
                case Connect() | Send() | SendFrame():
                    self._outbox.put(effect)
                case Disconnect(peer=peer):
                    connection = self.transport.connection(peer)
                    if connection is not None:
                        connection.lose()
                case Scatter():
                    environment = self._environment
                    delay = environment.costs.scatter.draw(environment.random)
                    self.process.after(delay, partial(self._scatter, effect))
                case Verify():
                    environment = self._environment
                    delay = environment.costs.scatter.draw(environment.random)
                    self.process.after(delay, partial(self._verify, effect))
        if not self._is_stepping:
            self._is_stepping = True
            self.process.after(0.0, self._step)

    # --- Routers ----------------------------------------------------------------------------------

    def on_session_opened(self, session: Session) -> None:
        previous = self.sessions.pop(session.router.incarnation, None)
        if previous is not None:
            previous.lose()
            self.carry_out(self.core.on_session_lost(session.router.incarnation))
        self.sessions[session.router.incarnation] = session
        for registration in self._registrations:
            registration.on_session_opened(session)

    def on_command(self, session: Session, command: pb.WorkerCommand) -> None:
        if self.sessions.get(session.router.incarnation) is session:
            self._environment.note(self.process.name, f"got {command.WhichOneof('body')}")
            self.carry_out(self.core.on_command(command, self.process.now))

    def on_session_ended(self, session: Session) -> None:
        for registration in self._registrations:
            registration.on_session_ended(session)
        if self.sessions.get(session.router.incarnation) is session:
            del self.sessions[session.router.incarnation]
            self._environment.note(self.process.name, "lost its session")
            self.carry_out(self.core.on_session_lost(session.router.incarnation))

    # --- Peers ------------------------------------------------------------------------------------

    def deliver(self, peer: bytes, header: bytes) -> None:
        message = decode(header)
        self._environment.note(self.process.name, f"got {type(message).__name__}")
        self.carry_out(self.core.on_message(peer, message, self.process.now))

    def lost(self, peer: bytes) -> None:
        self._environment.note(self.process.name, "lost a peer")
        effects = self.core.on_peer_lost(peer, self.process.now)  # first: what was queued is void
        self._outbox.drop(peer)
        self.carry_out(effects)

    @abstractmethod
    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        """The pages of `frame` are not read any more."""

    @abstractmethod
    def _scatter(self, effect: Scatter) -> None:
        """Move a landed frame into pages and tell the core."""

    @abstractmethod
    def _verify(self, effect: Verify) -> None:
        """Compare the checksum of a frame that landed in pages and tell the core."""

    def _on_unreachable(self, peer: bytes) -> None:
        self._environment.note(self.process.name, "cannot reach a peer")
        self.carry_out(self.core.on_peer_lost(peer, self.process.now))

    @abstractmethod
    def _on_layers_done(self, num_layers: int) -> None:
        """The first layers of the step that runs are computed, where its batch asked to know."""

    # --- The step loop ----------------------------------------------------------------------------

    def _step(self) -> None:
        batch, effects = self.core.next_batch(self.process.now)
        self.carry_out(effects)
        if batch is None:
            self._is_stepping = False
            return
        self._begin_step(batch)

    def _begin_step(self, batch: Batch) -> None:
        duration = self._environment.costs.step(batch, self._environment.random)
        ends = batch.layer_group_ends
        for index, num_layers in enumerate(ends, 1):
            delay = duration * index / (len(ends) + 1)
            self.process.after(delay, partial(self._finish_layers, batch, num_layers))
        if self._runs_ahead:
            self.process.after(duration * self._environment.random.random(), self._launch_ahead)
        self.process.after(duration, partial(self._finish_step, batch))

    def _launch_ahead(self) -> None:
        self._ahead = self.core.next_batch_ahead(self.process.now)
        if self._ahead and self._environment.happens(self._environment.faults.step_failure):
            self._drop_ahead()

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self.core.drop_batch_ahead()
            self._ahead = None

    def _finish_layers(self, batch: Batch, num_layers: int) -> None:
        self._model.compute_layers(batch, num_layers)
        self._on_layers_done(num_layers)

    def _finish_step(self, batch: Batch) -> None:
        # The model writes at the end of the step, so that pages freed too early would show.
        if self._environment.happens(self._environment.faults.step_failure):
            faulty = self._environment.random.randrange(len(batch.rows))
            self._drop_ahead()
            self.carry_out(self.core.on_batch_failed({faulty}))
            self.process.after(0.0, self._step)
            return
        result = self._model.execute(batch)
        self.carry_out(self.core.on_batch_done(result, self.process.now))
        if self._ahead is None:
            self.process.after(0.0, self._step)
            return
        ahead, self._ahead = self._ahead, None
        self._begin_step(with_known_tokens(ahead, result))

    # --- Time -------------------------------------------------------------------------------------

    def _beat(self) -> None:
        state = self.core.state()
        for router, session in self.sessions.items():
            route = pb.Route(sender=self.incarnation, receiver=router)
            session.emit(pb.WorkerEvent(route=route, heartbeat=state))
        self.carry_out(self.core.report_cache(list(self.sessions)))
        self.process.after(_HEARTBEAT_S, self._beat)

    def _tick(self) -> None:
        self.carry_out(self.core.tick(self.process.now))
        self.process.after(_TICK_S, self._tick)
