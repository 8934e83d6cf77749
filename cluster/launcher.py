"""The seam between an instance and whatever starts its worker processes.

A Launcher starts one process per call and never restarts it: that is the supervisor's job.
"""

from dataclasses import dataclass
from typing import Protocol

from pagewire.worker.config import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """How a worker process ended."""

    reason: str  # a clause such as "killed by SIGKILL", or the worker's own last sentence


class WorkerHandle(Protocol):
    """One running worker process."""

    @property
    def pid(self) -> int:
        """Process id on this machine."""

    async def wait(self) -> WorkerExit:
        """Return when the process has ended, whatever ended it. Many callers may wait."""

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end, kill it after `grace_s` seconds; return when it is gone."""

    async def kill(self) -> None:
        """End a process that does not answer, stopped ones too; return when it is gone."""


class Launcher(Protocol):
    """Starts worker processes."""

    async def launch(self, config: WorkerConfig) -> WorkerHandle:
        """Start one worker. Raises LaunchError when no process came up.

        Whoever does not want to wait any longer cancels it: then none comes up later either.
        """
