"""The supervisor against a scripted launcher: what ends is started again, until all is stopped."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence

import pytest

from pagewire.cluster.errors import LaunchError
from pagewire.cluster.hang import HangPolicy
from pagewire.cluster.launcher import Launcher, WorkerExit
from pagewire.cluster.restart import RestartPolicy
from pagewire.cluster.supervisor import Supervisor
from pagewire.worker.config import Role, WorkerConfig

TIMEOUT_S = 10.0


def supervisor(
    launcher: Launcher,
    names: Sequence[str],
    *,
    on_exit: Callable[[str, WorkerExit], None] = lambda *_: None,
    step_s: Callable[[str, int], float | None] = lambda *_: 0.0,
    policy: RestartPolicy | None = None,
    hang_policy: HangPolicy | None = None,
    grace_s: float = 5.0,
) -> Supervisor:
    return Supervisor(
        launcher,
        [config(name) for name in names],
        on_exit=on_exit,
        step_s=step_s,
        policy=policy,
        hang_policy=hang_policy,
        grace_s=grace_s,
    )


def config(name: str) -> WorkerConfig:
    return WorkerConfig(
        name=name, role=Role.DECODE, model="m", served_model="m", routers=("127.0.0.1:1",)
    )


class FakeHandle:
    """A process that ends when the test says so, or when it is stopped."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.grace_s: float | None = None
        self.was_killed = False
        self._exit: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()

    def die(self, reason: str) -> None:
        self._exit.set_result(WorkerExit(reason=reason))

    async def wait(self) -> WorkerExit:
        return await asyncio.shield(self._exit)

    async def stop(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.die("stopped")

    async def kill(self) -> None:
        self.was_killed = True
        self.die("killed")


class FakeLauncher:
    """Hands out processes in order; `refusals` launches fail before the first that succeeds."""

    def __init__(self, *, refusals: int = 0) -> None:
        self.launched: asyncio.Queue[tuple[str, FakeHandle]] = asyncio.Queue()
        self.running: list[FakeHandle] = []
        self._refusals = refusals

    async def launch(self, config: WorkerConfig) -> FakeHandle:
        if self._refusals:
            self._refusals -= 1
            raise LaunchError(f"no room for {config.name}")
        handle = FakeHandle(pid=100 + len(self.running))
        self.running.append(handle)
        self.launched.put_nowait((config.name, handle))
        return handle


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_a_worker_that_ends_is_started_again_and_reported() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        exits: list[tuple[str, WorkerExit]] = []
        async with supervisor(
            launcher, ["decode-0"], on_exit=lambda name, end: exits.append((name, end))
        ):
            for reason in ("first", "second"):
                _, handle = await launcher.launched.get()
                handle.die(reason)
            await launcher.launched.get()
        assert exits == [
            ("decode-0", WorkerExit(reason="first")),
            ("decode-0", WorkerExit(reason="second")),
        ]

    run(scenario)


def test_workers_are_independent() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        names = ["prefill-0", "decode-0"]
        async with supervisor(launcher, names):
            started = dict([await launcher.launched.get(), await launcher.launched.get()])
            assert sorted(started) == sorted(names)
            started["decode-0"].die("killed")
            name, _ = await launcher.launched.get()
            assert name == "decode-0"
        assert started["prefill-0"].grace_s is not None

    run(scenario)


def test_leaving_stops_what_runs_with_the_grace_and_reports_nothing() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        exits: list[str] = []
        async with supervisor(
            launcher, ["decode-0"], on_exit=lambda name, _: exits.append(name), grace_s=7.0
        ):
            _, handle = await launcher.launched.get()
        assert handle.grace_s == 7.0
        assert not exits

    run(scenario)


def test_leaving_ends_a_backoff_at_once() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        policy = RestartPolicy(quick_restarts=0, backoff_s=3600, max_backoff_s=3600)
        died = asyncio.Event()
        async with supervisor(launcher, ["decode-0"], on_exit=lambda *_: died.set(), policy=policy):
            _, handle = await launcher.launched.get()
            handle.die("killed")
            await died.wait()
        assert len(launcher.running) == 1

    run(scenario)


def test_nothing_is_started_once_all_shall_stop() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        async with supervisor(launcher, ["decode-0"]):
            _, handle = await launcher.launched.get()
            handle.die("killed at the very end")
        assert len(launcher.running) == 1

    run(scenario)


def test_a_launch_that_fails_is_reported_and_tried_again() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher(refusals=2)
        reasons: list[str] = []
        async with supervisor(
            launcher, ["decode-0"], on_exit=lambda _, end: reasons.append(end.reason)
        ):
            await launcher.launched.get()
        assert reasons == ["no room for decode-0"] * 2

    run(scenario)


@pytest.mark.parametrize(
    ("silence", "reason"),
    [(None, "it did not answer"), (7.0, "it was at one step for 7 s (step_timeout_s)")],
)
def test_a_worker_that_hangs_is_killed_and_started_again(
    silence: float | None, reason: str
) -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        heard: dict[str, float | None] = {"decode-0": 0.0, "decode-1": 0.0}
        looked: set[str] = set()

        def step_s(name: str, pid: int) -> float | None:
            looked.add(name)
            return heard[name]

        exits: list[tuple[str, str]] = []
        async with supervisor(
            launcher,
            list(heard),
            on_exit=lambda name, end: exits.append((name, end.reason)),
            step_s=step_s,
            hang_policy=HangPolicy(start_s=1e6, silence_s=0.003, step_s=7.0, look_s=0.001),
        ):
            started = dict([await launcher.launched.get(), await launcher.launched.get()])
            while "decode-0" not in looked:
                await asyncio.sleep(0)
            heard["decode-0"] = silence
            name, _ = await launcher.launched.get()
            heard["decode-0"] = 0.0
            assert name == "decode-0"
            assert started["decode-0"].was_killed and not started["decode-1"].was_killed
        assert exits == [("decode-0", f"{reason} and was killed")]

    run(scenario)


def test_a_worker_that_loads_its_model_has_time() -> None:
    async def scenario() -> None:
        launcher = FakeLauncher()
        async with supervisor(
            launcher,
            ["decode-0"],
            step_s=lambda *_: None,
            hang_policy=HangPolicy(start_s=1e6, silence_s=0.001, look_s=0.001),
        ):
            _, handle = await launcher.launched.get()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not handle.was_killed

    run(scenario)


def test_a_successor_has_time_while_its_predecessor_is_still_known() -> None:
    """A router may hear of the end of a process later than the supervisor."""

    async def scenario() -> None:
        launcher = FakeLauncher()
        num_looks: Counter[int] = Counter()  # by process

        def step_s(name: str, pid: int) -> float | None:
            num_looks[pid] += 1
            return 0.0 if pid == 100 else None

        async with supervisor(
            launcher,
            ["decode-0"],
            step_s=step_s,
            hang_policy=HangPolicy(start_s=1e6, silence_s=0.001, look_s=0.001),
        ):
            _, first = await launcher.launched.get()
            first.die("killed")
            _, second = await launcher.launched.get()
            while num_looks[second.pid] < 3:
                await asyncio.sleep(0)
            assert not second.was_killed

    run(scenario)


class Overcrowded(FakeLauncher):
    """Waits for room without end, as Ray does where no machine has enough GPUs."""

    def __init__(self, *, comes_up_late: bool = False) -> None:
        super().__init__()
        self.waits = asyncio.Event()
        self._comes_up_late = comes_up_late

    async def launch(self, config: WorkerConfig) -> FakeHandle:
        self.waits.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not self._comes_up_late:
                raise
        return await super().launch(config)


@pytest.mark.parametrize("comes_up_late", [False, True])
def test_leaving_does_not_wait_for_room(comes_up_late: bool) -> None:
    """A process that came up in the very moment is stopped like any other."""

    async def scenario() -> None:
        launcher = Overcrowded(comes_up_late=comes_up_late)
        exits: list[str] = []
        async with supervisor(
            launcher, ["decode-0"], on_exit=lambda name, _: exits.append(name), grace_s=7.0
        ):
            await launcher.waits.wait()
        assert [handle.grace_s for handle in launcher.running] == [7.0] * comes_up_late
        assert not exits

    run(scenario)
