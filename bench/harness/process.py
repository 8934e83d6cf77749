"""Engines as child processes: started, waited for, and stopped with everything below them."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

LOG_TAIL_CHARS = 2000
POLL_S = 0.05
STOP_TIMEOUT_S = 30.0

T = TypeVar("T")


class StartError(Exception):
    """An engine that did not start; says what its log ends with."""


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` that stops all engines on SIGTERM too, and then exits."""

    async def until_terminated() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    try:
        return asyncio.run(until_terminated())
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@asynccontextmanager
async def running_process(
    argv: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str | None],
    cwd: Path,
    stdin: int | None = asyncio.subprocess.DEVNULL,
    stdout: int | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program in a session of its own; at the end of the block the whole session is gone.

    `environment` is added to this process's; None takes a variable away. Output goes to the file
    `log`; `stdout` may take the standard output out of it. Raises StartError when there is no such
    program.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=stdin,
                stdout=output if stdout is None else stdout,
                stderr=output,
                env=_merged(environment),
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"{argv[0]} cannot be run: {error}") from error
    try:
        yield process
    finally:
        await _stop(process)


async def wait_ready(
    process: asyncio.subprocess.Process,
    is_ready: Callable[[], Awaitable[bool]],
    *,
    log: Path,
    timeout_s: float,
) -> float:
    """Poll until `is_ready` says so, and return the seconds that this took.

    Raises StartError when the process ends before, and after `timeout_s` seconds.
    """
    start = time.perf_counter()
    while not await is_ready():
        if process.returncode is not None:
            raise StartError(f"it ended with status {process.returncode}; {_tail(log)}")
        if time.perf_counter() - start > timeout_s:
            raise StartError(f"it was not ready after {timeout_s:.0f} s; {_tail(log)}")
        await asyncio.sleep(POLL_S)
    return time.perf_counter() - start


async def answers_ok(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            return (await client.get(url)).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def _merged(changes: Mapping[str, str | None]) -> dict[str, str]:
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def _tail(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return f"the log {log} ends with:\n{text[-LOG_TAIL_CHARS:]}"


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Interrupt, wait, and kill what is left of the session."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
