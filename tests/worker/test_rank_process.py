"""The process of a rank behind the first, without a rank 0 that would have work for it."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from socket import socketpair
from threading import Event

import pytest
import torch

from pagewire.engine.errors import DeviceError
from pagewire.engine.parallel.rank_group import RankLost, SingleRank
from pagewire.engine.parallel.tensor_parallel import TensorParallel
from pagewire.worker import followers as followers_module
from pagewire.worker.config import Role, WorkerConfig
from pagewire.worker.followers import follower_processes
from pagewire.worker.step_messages import STARTED

CONFIG = WorkerConfig(
    name="decode-0",
    role=Role.DECODE,
    model="absent",
    served_model="m",
    routers=("127.0.0.1:1",),
    tensor_parallel_size=2,
)
TIMEOUT_S = 120.0


def test_it_ends_with_rank_0_while_it_waits_for_it(tmp_path: Path) -> None:
    mine, theirs = socketpair()
    command = [sys.executable, "-m", "pagewire.worker.rank_process"]
    with mine, theirs:
        process = subprocess.Popen(
            [*command, CONFIG.to_json(), "1", str(tmp_path / "store"), "0"],
            stdin=theirs.fileno(),
        )
        theirs.close()
        mine.settimeout(TIMEOUT_S)
        assert mine.recv(1) == STARTED
    assert process.wait(TIMEOUT_S) == 1


def test_one_that_cannot_start_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def run() -> None:
        async with follower_processes(CONFIG) as followers:
            with pytest.raises(RankLost, match="rank 1 of 2 did not start"):
                await asyncio.to_thread(followers.join)

    asyncio.run(run())


def test_when_one_ends_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On GPUs nothing else would end what waits for it, in a graph perhaps."""

    aborted = Event()

    class Group(SingleRank):
        def abort(self) -> None:
            aborted.set()

    program = tmp_path / "rank"
    # It says that it has started, and ends when it is told anything.
    program.write_text("#!/bin/sh\nprintf + >&0\nhead -c 1 >/dev/null\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(
        followers_module, "join_ranks", lambda *_, **__: TensorParallel(group=Group())
    )

    async def run() -> None:
        async with follower_processes(CONFIG) as followers:
            await asyncio.to_thread(followers.join)
            followers.warm_up(1)
            with pytest.raises(RankLost, match="rank 1 of 2 ended, and with it the worker"):
                await followers.failure()

    asyncio.run(run())
    assert aborted.wait(TIMEOUT_S)


def test_none_starts_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)

    async def run() -> None:
        async with follower_processes(replace(CONFIG, device="cuda")):
            raise AssertionError("it has started")

    with pytest.raises(DeviceError, match="this torch is built for the CPU only"):
        asyncio.run(run())
