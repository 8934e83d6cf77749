"""The thin shell that both kinds of worker share: it feeds a pure core and does what it says."""

import asyncio
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Generic, TypeVar

import grpc
import torch

from pagewire.engine.batch import Batch, OnLayersDone, StepResult
from pagewire.engine.launched_step import LaunchedStep
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.page_pool import IntegrityError
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, decode
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.transport import Handler, Transport, TransportError
from pagewire.proto import worker_pb2 as pb
from pagewire.proto import worker_pb2_grpc as pb_grpc
from pagewire.proto.channel import GRPC_OPTIONS
from pagewire.worker.config import Role, WorkerConfig
from pagewire.worker.core import WorkerCore
from pagewire.worker.core_board import CoreBoard
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
from pagewire.worker.failpoint import Failpoint
from pagewire.worker.frame_reads import FrameReads
from pagewire.worker.interval import Interval
from pagewire.worker.links import Links
from pagewire.worker.sessions import WorkerService, keep_registered
from pagewire.worker.step_loop import StepLoop
from pagewire.worker.tasks import TaskSet, first_of

_HEARTBEAT_S = 1.0
_TICK_S = 0.25

Core = TypeVar("Core", bound=WorkerCore)

logger = logging.getLogger(__name__)


def new_model_thread(num_threads: int) -> ThreadPoolExecutor:
    """The thread that loads a model and runs its steps, with so many OpenMP threads."""
    return ThreadPoolExecutor(
        max_workers=1,
        thread_name_prefix="model",
        initializer=torch.set_num_threads,
        initargs=(num_threads,),
    )


class WorkerShell(Handler, Generic[Core]):
    """One worker process: a core, a model, routers above and peers beside it.

    All state belongs to the event loop. The model runs in one thread, gathers and scatters in
    another.
    """

    def __init__(
        self,
        *,
        config: WorkerConfig,
        core: Core,
        runner: ModelRunner,
        model_thread: ThreadPoolExecutor | None = None,
        on_state: Callable[[pb.WorkerState], None] | None = None,
        failpoint: Failpoint | None = None,
        overlap_steps: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """With `overlap_steps` a step is launched before the tokens of the one before are known.

        `model_thread` is the one thread in which the model was loaded, and is closed in the end.

        Every thread that runs parallel code has OpenMP threads of its own. With more of them than
        cores, OpenMP sends them to sleep after each matrix, and a step takes twice as long.
        """
        self._config = config
        self.core = core
        self._runner = runner
        self._on_state = on_state
        self._failpoint = failpoint
        self.clock = clock
        self._model_thread = model_thread or new_model_thread(config.threads_per_rank)
        self.io_thread = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="frames",
            initializer=torch.set_num_threads,
            initargs=(1,),  # the other cores belong to the model
        )
        self._tasks = TaskSet()
        self._service = WorkerService(
            incarnation=core.incarnation,
            on_command=self._on_command,
            on_session_lost=self._on_session_lost,
            inspect=self.inspect,
        )
        self._steps = StepLoop(
            core=core,
            execute=self._execute,
            thread=self._model_thread,
            carry_out=self.carry_out,
            on_idle=self._on_idle,
            on_layers_done=self._on_layers_done,
            launch=self._launch if overlap_steps else None,
            clock=clock,
        )
        self._board: CoreBoard | None = None
        self._links: Links | None = None
        self._reads: FrameReads | None = None  # of a worker that sends frames

    async def run(
        self,
        transports: Sequence[Transport],
        stop: asyncio.Event,
        pairs: OneConnection | None = None,
    ) -> None:
        """Serve until `stop` is set. `pairs` is what several transports call, instead of this.

        Raises TransportError and RegistrationRefused, and whatever breaks the worker.
        """
        async with AsyncExitStack() as stack:
            if self._config.core_board is not None:
                self._board = stack.enter_context(
                    CoreBoard(
                        Path(self._config.core_board),
                        slot=self._config.core_board_slot,
                        num_cores=self._config.num_threads,
                    )
                )
                if self._config.tensor_parallel_size == 1:  # ranks agree on a number once a step
                    self._runner.call_between_layers(self._claim_cores)
            stack.push_async_callback(self._close_threads)
            self._links = Links(
                transports=transports,
                pairs=pairs,
                reads=self._reads,
                on_frame_sent=self._on_frame_sent,
                on_peer_lost=self._on_peer_lost,
                has_handoff=self._has_handoff,
                spawn=self._tasks.spawn,
                clock=self.clock,
            )
            stack.push_async_callback(self._links.close)
            for transport in transports:
                await transport.start()
            address = await self._serve_sessions(stack)
            stack.push_async_callback(self._tasks.cancel)
            info = self._registration(address, transports)
            for work in (
                self._steps.run(),
                self._beat(),
                self._tick(),
                keep_registered(self._service, self._config.routers, info),
            ):
                self._tasks.spawn(work)
            await first_of(stop.wait(), self._tasks.failure())

    async def _serve_sessions(self, stack: AsyncExitStack) -> str:
        """Serve the Worker service on a free port; returns its host:port."""
        server = grpc.aio.server(options=GRPC_OPTIONS)
        pb_grpc.add_WorkerServicer_to_server(self._service, server)
        try:
            port = server.add_insecure_port(f"{self._config.host}:0")
        except RuntimeError as error:
            raise TransportError(
                f"cannot listen on {self._config.host}; is it an address of this machine?"
            ) from error
        await server.start()
        stack.push_async_callback(server.stop, None)
        stack.callback(self._service.close)
        return f"{self._config.host}:{port}"

    async def _close_threads(self) -> None:
        """Off the loop: the model may be in the middle of a step."""
        for thread in (self._model_thread, self.io_thread):
            await asyncio.to_thread(thread.shutdown)
        self._runner.close()

    def inspect(self) -> pb.WorkerState:
        """The state, after a check of every page and slot."""
        state = self.state()
        try:
            self.core.check_integrity()
        except IntegrityError as error:
            logger.critical("the books of %s do not balance: %s", self._config.name, error)
            state.integrity_error = str(error)
        return state

    def state(self) -> pb.WorkerState:
        """The core's state with what the model is at, and what the transports have carried."""
        state = self.core.state()
        state.step_s = self._steps.step_s()
        if self._links is not None:
            connections = self._links.connections
            state.links.extend(connections.states())
            state.transfers.extend(
                pb.TransferTotals(
                    kind=kind,
                    bytes_sent=transport.stats.bytes_sent,
                    bytes_received=transport.stats.bytes_received,
                    send_seconds=transport.stats.send_seconds,
                    receive_seconds=transport.stats.receive_seconds,
                    failures=transport.stats.failures,
                    trips=connections.num_trips[kind],
                )
                for kind, transport in connections.transports.items()
            )
        return state

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the core asks for, in order, and let it go on."""
        for effect in effects:
            match effect:
                case Emit(event=event):
                    self._service.emit(event)
                case Connect() | Send() | SendFrame():
                    assert self._links is not None, "effects come once the worker runs"
                    self._links.put(effect)
                case Disconnect(peer=peer):
                    assert self._links is not None, "effects come once the worker runs"
                    self._links.disconnect(peer)
                case Scatter():
                    self._tasks.spawn(self._scatter(effect))
                case Verify():
                    self._tasks.spawn(self._verify(effect))
        self._steps.wake()

    # --- Transport handler ------------------------------------------------------------------------

    @abstractmethod
    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        """See Handler."""

    def deliver(self, peer: bytes, header: bytes) -> None:
        message = decode(header)
        if self._failpoint is not None:
            self._failpoint.reach(message)
        with self._tasks:
            self.carry_out(self.core.on_message(peer, message, self.clock()))
            self._improve_connections()

    def lost(self, peer: bytes, reason: str) -> None:
        with self._tasks:
            effects = self.core.on_peer_lost(peer, self.clock())  # first: what was queued is void
            if self._links is not None:
                self._links.drop(peer)
            self.carry_out(effects)

    def is_direct(self, peer: bytes) -> bool:
        """Whether frames between this worker and `peer` go from device to device."""
        return self._links is not None and self._links.is_direct(peer)

    def _improve_connections(self) -> None:
        """A hand-off may have ended that kept a pair on a transport which is not its best."""
        if self._links is not None:
            self._links.connections.improve()

    def _on_peer_lost(self, peer: bytes) -> None:
        """There was no connection to `peer`, and none could be made."""
        self.carry_out(self.core.on_peer_lost(peer, self.clock()))

    # --- Sessions ---------------------------------------------------------------------------------

    def _on_command(self, command: pb.WorkerCommand) -> None:
        with self._tasks:
            self.carry_out(self.core.on_command(command, self.clock()))

    def _on_session_lost(self, router: bytes) -> None:
        with self._tasks:
            self.carry_out(self.core.on_session_lost(router))

    # --- What only one kind of worker does --------------------------------------------------------

    @abstractmethod
    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        """The pages of `frame` are not read any more; without a checksum it was not sent."""

    @abstractmethod
    def _has_handoff(self, peer: bytes) -> bool:
        """Whether a hand-off that needs the connection to `peer` is under way."""

    @abstractmethod
    async def _scatter(self, effect: Scatter) -> None:
        """Move a landed frame into pages and tell the core."""

    @abstractmethod
    async def _verify(self, effect: Verify) -> None:
        """Compare the checksum of a frame that landed in pages and tell the core."""

    @abstractmethod
    def _on_layers_done(self, num_layers: int) -> None:
        """The first layers of the step that runs are computed, where its batch asked to know."""

    # --- The model --------------------------------------------------------------------------------

    def _execute(self, batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        """Run a step, in the model's thread."""
        self._claim_cores()
        return self._run_batch(batch, on_layers_done)

    def _launch(self, batch: Batch, *, previous: LaunchedStep | None) -> LaunchedStep:
        """Begin a step, in the model's thread."""
        self._claim_cores()
        return self._runner.launch(batch, previous=previous)

    def _claim_cores(self) -> None:
        """In the model's thread: the number of OpenMP threads belongs to that one."""
        if self._board is not None:
            size = self._config.tensor_parallel_size
            torch.set_num_threads(max(1, self._board.claim() // size))

    def _run_batch(self, batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        return self._runner.execute(batch, on_layers_done)

    def _on_idle(self) -> None:
        if self._board is not None:
            self._board.release()

    # --- Time -------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            state = self.state()
            self._service.heartbeat(state)
            self.carry_out(self.core.report_cache(self._service.routers))
            if self._on_state is not None:
                self._on_state(state)
            await asyncio.sleep(_HEARTBEAT_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._steps.step_s()
            self.carry_out(self.core.tick(self.clock()))
            self._improve_connections()

    def _registration(self, address: str, transports: Sequence[Transport]) -> pb.RegisterRequest:
        role = pb.ROLE_PREFILL if self._config.role is Role.PREFILL else pb.ROLE_DECODE
        return pb.RegisterRequest(
            name=self._config.name,
            role=role,
            incarnation=self.core.incarnation,
            address=address,
            pid=os.getpid(),
            device=self._config.device,
            model=self._config.served_model,
            max_model_len=self._runner.max_model_len,
            num_pages=self._runner.num_pages,
            layout=_layout_message(self._runner.layout),
            model_digest=self._runner.digest,
            transports=[
                pb.TransportAddress(kind=transport.kind, address=transport.address)
                for transport in transports
            ],
        )


def _layout_message(layout: KVLayout) -> pb.KVLayout:
    return pb.KVLayout(
        page_size=layout.page_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )
