"""The ranks of a worker behind the first, as child processes of the one that runs rank 0.

Rank 0 has the core, the event loop and all connections. The others hold their part of the model and
of every page, and run the steps that rank 0 tells them. A group lives and dies as one.
"""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__

from pagewire.engine.batch import PageCopy
from pagewire.engine.errors import KernelError
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_shards import KVShards
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.process_group import join_group
from pagewire.engine.parallel.rank_group import RankLost
from pagewire.engine.parallel.shared_pools import SharedPools, new_shared_memory
from pagewire.engine.parallel.tensor_parallel import TensorParallel
from pagewire.engine.step_memory import StepInputs
from pagewire.worker.config import WorkerConfig
from pagewire.worker.step_messages import STARTED, Copies, Step
from pagewire.worker.tasks import first_of

_START_TIMEOUT_S = 300.0  # of a process that imports torch
_SEND_TIMEOUT_S = 60.0


class FollowerProcesses:
    """Implements Followers. A context: within it the processes run, behind it they are gone.

    Raises KernelError for a device whose memory processes cannot share.
    """

    def __init__(self, config: WorkerConfig) -> None:
        if config.device != "cpu":
            raise KernelError(
                f"tensor_parallel_size is {config.tensor_parallel_size} and device "
                f"{config.device}: rank 0 sends the pages of all ranks from memory that they "
                "share, which only device cpu has"
            )
        self._config = config
        self._size = config.tensor_parallel_size
        self._stack = AsyncExitStack()
        self._processes: list[asyncio.subprocess.Process] = []
        self._sockets: list[socket.socket] = []

    @property
    def pids(self) -> list[int]:
        """Process ids, from rank 1 on."""
        return [process.pid for process in self._processes]

    async def __aenter__(self) -> "FollowerProcesses":
        """Start the processes; they load their part while rank 0 does."""
        async with AsyncExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagewire-"))
            self._store_path = Path(directory) / "ranks"
            descriptor = new_shared_memory()
            stack.callback(os.close, descriptor)
            self._pools = SharedPools(descriptor, self._size)
            stack.push_async_callback(self._end)
            for rank in range(1, self._size):
                await self._start(rank, descriptor)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def join(self) -> TensorParallel:
        """The place of rank 0, once all others are there. Blocks. Raises RankLost."""
        for rank, sock in enumerate(self._sockets, start=1):
            self._await_start(rank, sock)
        group = join_group(
            FileStore(str(self._store_path), self._size),
            0,
            self._size,
            in_rank_order=self._config.deterministic,
        )
        return TensorParallel(
            group=group,
            followers=self,
            pool_memory=lambda num_bytes: self._pools.pool(0, num_bytes),
        )

    def shards(self, runner: ModelRunner) -> KVShards:
        """The pages of all ranks; `runner` is that of rank 0."""
        layout, num_pages = runner.kv_cache.layout, runner.num_pages
        pools = [
            self._pools.pool(rank, num_pages * layout.page_bytes) for rank in range(self._size)
        ]
        return KVShards(
            runner.layout, tuple(KVCache(layout, num_pages, memory=pool) for pool in pools)
        )

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        self._send(Copies(copies=tuple(copies)).encode())

    def run(self, inputs: StepInputs) -> None:
        self._send(Step.of(inputs, torch.get_num_threads()).encode())

    async def failure(self) -> None:
        """Wait until one of the processes ends, and raise RankLost."""
        await first_of(*(self._end_of(rank) for rank in range(1, self._size)))

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

    async def _start(self, rank: int, descriptor: int) -> None:
        mine, theirs = socket.socketpair()
        self._sockets.append(mine)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pagewire.worker.rank_process",
                self._config.to_json(),
                str(rank),
                str(self._store_path),
                str(descriptor),
                stdin=theirs.fileno(),
                pass_fds=(descriptor,),
            )
        self._processes.append(process)

    async def _end_of(self, rank: int) -> None:
        code = await self._processes[rank - 1].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "ended"
        raise RankLost(f"rank {rank} of {self._size} {how}, and with it the worker")

    async def _end(self) -> None:
        """They have nothing to finish, and may be in the middle of a step."""
        for sock in self._sockets:
            sock.close()
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
