"""Keeps the workers of an instance running: starts each again when it ends, until told to stop.

One that hangs is killed first. A thin shell around `restart` and `hang`. Every start is a new
process, which gives itself a new incarnation; what an earlier one held is gone with it.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

from pagewire.cluster.errors import LaunchError
from pagewire.cluster.hang import HangPolicy, HangWatch
from pagewire.cluster.launcher import Launcher, WorkerExit, WorkerHandle
from pagewire.cluster.restart import (
    Action,
    Event,
    Finish,
    Kill,
    Launch,
    RestartPolicy,
    Supervision,
    Terminate,
    Wait,
    decide,
)
from pagewire.worker.config import WorkerConfig


class Supervisor:
    """Runs `configs` on `launcher` while its context is open, each restarted when it ends.

    `on_exit` is called with the worker's name for every process that ended without being asked.
    `step_s` says, by a worker's name and the id of its process, for how long its step has run; None
    when no router hears of the process. By that `hang_policy` decides whether it is killed, and
    started again.
    Leaving the context stops all workers, those that do not end in `grace_s` seconds by force.
    """

    def __init__(
        self,
        launcher: Launcher,
        configs: Iterable[WorkerConfig],
        *,
        on_exit: Callable[[str, WorkerExit], None],
        step_s: Callable[[str, int], float | None],
        policy: RestartPolicy | None = None,
        hang_policy: HangPolicy | None = None,
        grace_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launcher = launcher
        self._configs = tuple(configs)
        self._on_exit = on_exit
        self._step_s = step_s
        self._policy = policy or RestartPolicy()
        self._hang_policy = hang_policy or HangPolicy()
        self._grace_s = grace_s
        self._clock = clock
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Supervisor":
        self._tasks = [asyncio.create_task(self._supervise(config)) for config in self._configs]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _supervise(self, config: WorkerConfig) -> None:
        worker = _Worker(
            self._launcher,
            config,
            stop=self._stop,
            on_exit=self._on_exit,
            step_s=lambda pid: self._step_s(config.name, pid),
            hang_policy=self._hang_policy,
            grace_s=self._grace_s,
        )
        state, action = decide(self._policy, Supervision(), Event.BEGIN, self._clock())
        while not isinstance(action, Finish):
            event = await worker.carry_out(action)
            state, action = decide(self._policy, state, event, self._clock())


class _Worker:
    """Carries out the actions of one worker; each yields the event that follows it."""

    def __init__(
        self,
        launcher: Launcher,
        config: WorkerConfig,
        *,
        stop: asyncio.Event,
        on_exit: Callable[[str, WorkerExit], None],
        step_s: Callable[[int], float | None],
        hang_policy: HangPolicy,
        grace_s: float,
    ) -> None:
        self._launcher = launcher
        self._config = config
        self._stop = stop
        self._on_exit = on_exit
        self._step_s = step_s
        self._hang_policy = hang_policy
        self._grace_s = grace_s
        self._handle: WorkerHandle | None = None
        self._complaint = ""  # why it counts as hung

    async def carry_out(self, action: Action) -> Event:
        match action:
            case Launch():
                return await self._launch()
            case Wait(delay_s=delay_s):
                return await self._wait(delay_s)
            case Terminate():
                if self._handle is not None:
                    await self._handle.stop(self._grace_s)
                return Event.EXITED
            case Kill():
                return await self._kill()
            case Finish():
                raise ValueError("nothing follows Finish")

    async def _launch(self) -> Event:
        """Start the process and stay with it until it ends or hangs, or all shall stop."""
        self._handle = None
        try:
            self._handle = await self._start()
        except LaunchError as error:
            self._on_exit(self._config.name, WorkerExit(reason=str(error)))
            return Event.EXITED
        if self._handle is None:
            return Event.STOP
        end = asyncio.create_task(self._handle.wait())
        stop = asyncio.create_task(self._stop.wait())
        hang = asyncio.create_task(self._hang(self._handle.pid))
        await asyncio.wait({end, stop, hang}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        hang.cancel()
        if not end.done():
            end.cancel()
            return Event.STOP if self._stop.is_set() else Event.HUNG
        if not self._stop.is_set():
            self._on_exit(self._config.name, end.result())
        return Event.EXITED

    async def _start(self) -> WorkerHandle | None:
        """The process; None when all shall stop before there is one. Raises LaunchError.

        A launcher may wait for as long as no machine has room, and nobody may wait for that.
        """
        launch = asyncio.ensure_future(self._launcher.launch(self._config))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({launch, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not launch.done():
            launch.cancel()
            await asyncio.wait({launch})
        return None if launch.cancelled() else launch.result()

    async def _hang(self, pid: int) -> None:
        """Return when the process has hung."""
        watch = HangWatch(self._hang_policy)
        while (complaint := watch.look(self._step_s(pid))) is None:
            await asyncio.sleep(self._hang_policy.look_s)
        self._complaint = complaint

    async def _kill(self) -> Event:
        if self._handle is not None:
            await self._handle.kill()
        self._on_exit(self._config.name, WorkerExit(reason=f"{self._complaint} and was killed"))
        return Event.EXITED

    async def _wait(self, delay_s: float) -> Event:
        if self._stop.is_set():  # which wait_for would not see with a delay of 0
            return Event.STOP
        try:
            await asyncio.wait_for(self._stop.wait(), delay_s)
        except TimeoutError:
            return Event.WAITED
        return Event.STOP
