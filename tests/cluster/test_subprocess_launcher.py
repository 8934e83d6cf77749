"""Real child processes: their start, their end by any cause, and the reason that is told."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from pagewire.cluster.errors import LaunchError
from pagewire.cluster.subprocess_launcher import SubprocessLauncher
from pagewire.worker.config import Role, WorkerConfig

CONFIG = WorkerConfig(
    name="decode-0",
    role=Role.DECODE,
    model="m",
    served_model="m",
    routers=("127.0.0.1:1",),
    num_threads=3,
)
TIMEOUT_S = 30.0

# Each program makes `ready` once it runs, so that no test has to guess when that is.
PROGRAMS = {
    "report": "out.write_text(sys.argv[1] + '\\n' + os.environ['OMP_NUM_THREADS']); ready()",
    "wait": "ready(); signal.pause()",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); signal.pause()",
    "ranks": (
        "import subprocess; rank = subprocess.Popen(['sh', '-c', 'kill -STOP $$']); "
        "os.waitpid(rank.pid, os.WUNTRACED); ready(); signal.pause()"
    ),
    "clean": "ready()",
    "fail": "print('a warning', file=sys.stderr); sys.exit('decode-0: the model is damaged')",
    "silent": "os._exit(3)",
}


def launcher(program: str, directory: Path) -> SubprocessLauncher:
    prologue = (
        "import os, pathlib, signal, sys\n"
        f"out = pathlib.Path({str(directory / 'out')!r})\n"
        f"ready = pathlib.Path({str(directory / 'ready')!r}).touch\n"
    )
    return SubprocessLauncher((sys.executable, "-c", prologue + PROGRAMS[program]))


async def appear(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.01)


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), TIMEOUT_S))


def test_configuration_and_environment_arrive(tmp_path: Path) -> None:
    async def scenario() -> None:
        handle = await launcher("report", tmp_path).launch(CONFIG)
        await handle.wait()
        config_json, num_threads = (tmp_path / "out").read_text().splitlines()
        assert WorkerConfig.from_json(config_json) == CONFIG
        assert json.loads(config_json)["name"] == "decode-0"
        assert num_threads == "3"

    run(scenario)


def test_kill_is_noticed_and_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        handle = await launcher("wait", tmp_path).launch(CONFIG)
        await appear(tmp_path / "ready")
        os.kill(handle.pid, signal.SIGKILL)
        first, second = await asyncio.gather(handle.wait(), handle.wait())
        assert first == second
        assert first.reason == "killed by SIGKILL"

    run(scenario)


def test_a_stopped_process_can_be_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        handle = await launcher("wait", tmp_path).launch(CONFIG)
        await appear(tmp_path / "ready")
        os.kill(handle.pid, signal.SIGSTOP)
        await handle.kill()
        assert (await handle.wait()).reason == "killed by SIGKILL"
        await handle.kill()  # of an ended process: nothing happens

    run(scenario)


def test_a_killed_process_takes_its_ranks_along(tmp_path: Path) -> None:
    """One that is stopped keeps its standard error open, and would be waited for without end."""

    async def scenario() -> None:
        handle = await launcher("ranks", tmp_path).launch(CONFIG)
        await appear(tmp_path / "ready")
        await handle.kill()
        assert (await handle.wait()).reason == "killed by SIGKILL"

    run(scenario)


@pytest.mark.parametrize("program", ["wait", "deaf"])
def test_stop_returns_when_the_process_is_gone(tmp_path: Path, program: str) -> None:
    async def scenario() -> None:
        handle = await launcher(program, tmp_path).launch(CONFIG)
        await appear(tmp_path / "ready")
        await handle.stop(grace_s=TIMEOUT_S if program == "wait" else 0.1)
        end = await handle.wait()
        assert end.reason == f"killed by {'SIGTERM' if program == 'wait' else 'SIGKILL'}"
        with pytest.raises(ProcessLookupError):
            os.kill(handle.pid, 0)

    run(scenario)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("clean", "it ended with exit code 0"),
        ("fail", "decode-0: the model is damaged"),
        ("silent", "it ended with exit code 3"),
    ],
)
def test_reason_is_the_last_line_or_the_exit_code(
    tmp_path: Path, program: str, reason: str
) -> None:
    async def scenario() -> None:
        handle = await launcher(program, tmp_path).launch(CONFIG)
        assert (await handle.wait()).reason == reason
        await handle.stop(grace_s=1.0)  # of an ended process: nothing happens

    run(scenario)


def test_command_that_does_not_exist() -> None:
    async def scenario() -> None:
        with pytest.raises(LaunchError, match="decode-0"):
            await SubprocessLauncher(("/does/not/exist",)).launch(CONFIG)

    run(scenario)
