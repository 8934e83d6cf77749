"""The ranks of a worker behind the first, as child processes of the one that runs rank 0.

Rank 0 has the core, the event loop and all connections. The others hold their part of the model and
of every page, and run the steps that rank 0 tells them. A group lives and dies as one.
"""

import asyncio
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from threading import Thread

import torch

from pagewire.engine.batch import PageCopy
from pagewire.engine.device import require_device
from pagewire.engine.parallel.rank_group import RankGroup, RankLost
from pagewire.engine.parallel.shared_pools import shared_memory
from pagewire.engine.parallel.tensor_parallel import TensorParallel
from pagewire.engine.step_memory import StepArrays
from pagewire.worker.config import WorkerConfig
from pagewire.worker.load import join_ranks
from pagewire.worker.step_messages import STARTED, Copies, Step, WarmUp
from pagewire.worker.tasks import first_of

_START_TIMEOUT_S = 300.0  # of a process that imports torch
_SEND_TIMEOUT_S = 60.0


@asynccontextmanager
async def follower_processes(config: WorkerConfig) -> AsyncIterator["FollowerProcesses"]:
    """Within this context the processes run, behind it they are gone.

    They load their part of the model while rank 0 does. Raises EngineError where there is no device
    or no memory to share, and OSError.
    """
    require_device(config.device)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagewire-"))
        memory = stack.enter_context(shared_memory()) if config.device == "cpu" else None
        followers = FollowerProcesses(config, store_path=f"{directory}/ranks", memory=memory)
        try:
            await followers.start()
            yield followers
        finally:
            await followers.end()


class FollowerProcesses:
    """Implements Followers. Made by `follower_processes`."""

    def __init__(self, config: WorkerConfig, *, store_path: str, memory: int | None) -> None:
        """`store_path`, `memory`: see `join_ranks`."""
        self._config = config
        self._size = config.tensor_parallel_size
        self._store_path = store_path
        self._memory = memory
        self._processes: list[asyncio.subprocess.Process] = []
        self._sockets: list[socket.socket] = []
        self._group: RankGroup | None = None
        self._lost: asyncio.Task[None] | None = None
        self._is_lost = False

    async def start(self) -> None:
        """Start the processes. Raises OSError."""
        for rank in range(1, self._size):
            await self._start(rank)
        self._lost = asyncio.create_task(self._watch())

    async def end(self) -> None:
        """Kill them: they have nothing to finish, and may be in the middle of a step."""
        if self._lost is not None:
            self._lost.cancel()
            await asyncio.gather(self._lost, return_exceptions=True)
        for sock in self._sockets:
            sock.close()
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def join(self) -> TensorParallel:
        """The place of rank 0, once all others are there. Blocks. Raises what `join_ranks` does."""
        for rank, sock in enumerate(self._sockets, start=1):
            self._await_start(rank, sock)
        parallel = join_ranks(
            self._config, 0, store_path=self._store_path, memory=self._memory, followers=self
        )
        self._group = parallel.group
        if self._is_lost:  # of that group no call would end
            raise RankLost(f"one of {self._size} ranks has ended; see what it wrote above")
        return parallel

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        self._send(Copies(copies=tuple(copies)).encode())

    def warm_up(self, max_rows: int) -> None:
        self._send(WarmUp(max_rows=max_rows).encode())

    def run(self, arrays: StepArrays, *, by_layer: bool, is_fed: bool) -> None:
        num_threads = torch.get_num_threads()
        step = Step.of(arrays, num_threads=num_threads, by_layer=by_layer, is_fed=is_fed)
        self._send(step.encode())

    async def failure(self) -> None:
        """Wait until one of the processes ends, and raise RankLost."""
        assert self._lost is not None, "start them first"
        await asyncio.shield(self._lost)

    def _send(self, message: bytes) -> None:
        for rank, sock in enumerate(self._sockets, start=1):
            try:
                sock.sendall(message)
            except OSError as error:
                raise RankLost(f"rank {rank} of {self._size} takes no steps: {error}") from error

    def _await_start(self, rank: int, sock: socket.socket) -> None:
        """Not the group's business, whose members would wait for each other until a time-out."""
        sock.settimeout(_START_TIMEOUT_S)
        try:
            has_started = sock.recv(len(STARTED)) == STARTED
        except OSError:
            has_started = False
        if not has_started:
            raise RankLost(f"rank {rank} of {self._size} did not start; see what it wrote above")
        sock.settimeout(_SEND_TIMEOUT_S)

    async def _start(self, rank: int) -> None:
        mine, theirs = socket.socketpair()
        self._sockets.append(mine)
        shared = () if self._memory is None else (self._memory,)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pagewire.worker.rank_process",
                self._config.to_json(),
                str(rank),
                self._store_path,
                *map(str, shared),
                stdin=theirs.fileno(),
                pass_fds=shared,
            )
        self._processes.append(process)

    async def _watch(self) -> None:
        """From their start on: while rank 0 loads or runs a step it may wait for one in vain."""
        try:
            await first_of(*(self._end_of(rank) for rank in range(1, self._size)))
        except RankLost:
            self._is_lost = True
            if self._group is not None:  # beside all else: it may last until recordings are gone
                Thread(target=self._group.abort, name="abort", daemon=True).start()
            raise

    async def _end_of(self, rank: int) -> None:
        code = await self._processes[rank - 1].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "ended"
        raise RankLost(f"rank {rank} of {self._size} {how}, and with it the worker")
