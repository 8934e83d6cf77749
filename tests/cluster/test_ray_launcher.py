"""Workers in Ray, with a stand-in for Ray: what its own calls do not reach."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from pagewire.cluster import processes
from pagewire.cluster.ray_launcher import RayHandle, RayLauncher
from pagewire.worker.config import Role, WorkerConfig

TIMEOUT_S = 30.0
# A worker with a rank that is stopped; it tells when that is so.
WORKER = (
    "import os, signal, subprocess\n"
    "rank = subprocess.Popen(['sh', '-c', 'kill -STOP $$'])\n"
    "os.waitpid(rank.pid, os.WUNTRACED)\n"
    "print(flush=True)\n"
    "signal.pause()"
)
CONFIG = WorkerConfig(
    name="decode-0", role=Role.DECODE, model="m", served_model="m", routers=("127.0.0.1:1",)
)


def test_a_killed_worker_takes_its_ranks_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks a process to end, which one that is stopped cannot."""

    async def scenario(worker: "subprocess.Popen[bytes]") -> None:
        run: Any = asyncio.get_running_loop().create_future()

        def kill(actor: object) -> None:
            if not run.done():
                run.set_exception(ActorDiedError())

        monkeypatch.setattr(ray, "kill", kill)
        handle = RayHandle(object(), worker.pid, run)
        await handle.kill()
        assert "killed" in (await handle.wait()).reason

    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        tree = processes.tree(worker.pid)
        assert len(tree) == 2
        asyncio.run(asyncio.wait_for(scenario(worker), TIMEOUT_S))
        assert not processes.wait_gone(tree, TIMEOUT_S)
    assert not processes.tree(worker.pid)


def test_an_actor_that_nobody_waits_for_is_never_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        killed: list[object] = []
        placing = asyncio.Event()

        class Method:
            async def _placed(self) -> int:
                placing.set()
                pid: int = await asyncio.get_running_loop().create_future()
                return pid

            def remote(self, *_: object) -> Any:
                return self._placed()

        class Actor:
            prepare = Method()

        class ActorClass:
            def options(self, **_: object) -> "ActorClass":
                return self

            def remote(self) -> Actor:
                return Actor()

        monkeypatch.setattr(ray, "remote", lambda cls: ActorClass())
        monkeypatch.setattr(ray, "kill", killed.append)
        launch = asyncio.create_task(RayLauncher().launch(CONFIG))
        await placing.wait()
        launch.cancel()
        await asyncio.wait({launch})
        assert launch.cancelled()
        assert [type(actor) for actor in killed] == [Actor]

    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))
