"""Workers as plain child processes: cheap to start, for benchmarks, tests and machines without Ray.

What each writes to standard error is passed on; its last line there is the reason that is reported
when it fails.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from pagewire.cluster.errors import LaunchError
from pagewire.cluster.launcher import WorkerExit
from pagewire.cluster.placement import gpu_environment, worker_environment
from pagewire.worker.config import WorkerConfig

WORKER_COMMAND = (sys.executable, "-m", "pagewire.cluster.worker_process", "--ends-with-stdin")
_MAX_LINE_BYTES = 1 << 20


class SubprocessLauncher:
    """Implements Launcher. `command` gets the worker's configuration as its last argument."""

    def __init__(self, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._command = tuple(command)

    async def launch(self, config: WorkerConfig) -> "SubprocessHandle":
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                config.to_json(),
                env=os.environ | worker_environment(config) | gpu_environment(config, os.environ),
                stdin=asyncio.subprocess.PIPE,  # never written: it ends when this process does
                stderr=asyncio.subprocess.PIPE,
                limit=_MAX_LINE_BYTES,
                # Ctrl-C in the terminal is for the parent alone, and `kill` for all ranks.
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start {config.name}: {error}") from error
        return SubprocessHandle(process)


class SubprocessHandle:
    """Implements WorkerHandle."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._last_line = ""
        self._end = asyncio.create_task(self._watch())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> WorkerExit:
        return await asyncio.shield(self._end)

    async def stop(self, grace_s: float) -> None:
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """The ranks that it started, too: stopped ones would not notice that it is gone."""
        if not self._end.done():
            with contextlib.suppress(ProcessLookupError):  # it is ending just now
                os.killpg(self._process.pid, signal.SIGKILL)
        await self.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def _watch(self) -> WorkerExit:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            sys.stderr.write(line.decode(errors="replace"))
            self._last_line = line.decode(errors="replace").strip() or self._last_line
        code = await self._process.wait()
        return WorkerExit(reason=self._describe(code))

    def _describe(self, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return self._last_line if code and self._last_line else f"it ended with exit code {code}"
