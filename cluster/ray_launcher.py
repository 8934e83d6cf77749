"""Workers as named Ray actors, each in its own process.

Ray never restarts them by itself: the supervisor does, with the same policy for every launcher.
"""

import asyncio
import contextlib
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from pagewire.cluster import processes
from pagewire.cluster.errors import LaunchError
from pagewire.cluster.launcher import WorkerExit
from pagewire.cluster.placement import worker_environment
from pagewire.cluster.ray_worker import RayWorker
from pagewire.worker.config import WorkerConfig

_GONE_TIMEOUT_S = 2.0


class RayLauncher:
    """Implements Launcher in the Ray cluster that this process is connected to."""

    async def launch(self, config: WorkerConfig) -> "RayHandle":
        actor_class = ray.remote(RayWorker).options(
            name=config.name,
            # Which ones, Ray tells its process, and that those of its ranks.
            num_gpus=0 if config.gpu is None else config.tensor_parallel_size,
            num_cpus=0,  # always placed: what cores a worker uses is num_threads' business
            max_restarts=0,
            max_concurrency=2,  # `run`, and `stop` beside it
        )
        try:
            actor: Any = actor_class.remote()
            try:
                pid = await actor.prepare.remote(worker_environment(config))
            except asyncio.CancelledError:
                ray.kill(actor)  # Ray may still wait for a place to start it in
                raise
        except (RayError, ValueError) as error:  # ValueError: the name is not free yet
            raise LaunchError(f"Ray cannot start {config.name}: {_sentence(error)}") from error
        return RayHandle(actor, pid, actor.run.remote(config.to_json()))


class RayHandle:
    """Implements WorkerHandle. `run` is the result of the actor's only long call."""

    def __init__(self, actor: Any, pid: int, run: "ray.ObjectRef[None]") -> None:
        self._actor = actor
        self._pid = pid
        self._end = asyncio.create_task(self._watch(run))

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> WorkerExit:
        return await asyncio.shield(self._end)

    async def stop(self, grace_s: float) -> None:
        self._actor.stop.remote()
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Ray asks the process itself, which may be stopped, as may the ranks that it started."""
        tree = processes.tree(self._pid)  # before the ranks lose their parent
        ray.kill(self._actor)
        processes.kill(tree)
        await self.wait()

    async def _watch(self, run: "ray.ObjectRef[None]") -> WorkerExit:
        try:
            await run
            reason = "it ended by itself"
        except RayTaskError as error:
            reason = _sentence(error)
        except RayActorError:
            reason = "its process was killed or crashed"
        ray.kill(self._actor)  # the process would outlive its work
        await asyncio.to_thread(_wait_gone, self._pid)
        return WorkerExit(reason=reason)


def _sentence(error: Exception) -> str:
    """The message of the worker's own exception, without Ray's account of where it was raised."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return str(error.cause)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _wait_gone(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        processes.wait_gone({psutil.Process(pid)}, _GONE_TIMEOUT_S)
