"""The Ray actor that is a worker's process.

The worker runs on an event loop of its own in one of the actor's threads, so that Ray's calls
never wait for it, nor it for them.
"""

import asyncio
import logging
import os
from collections.abc import Mapping

from pagewire.worker.config import WorkerConfig


class RayWorker:
    """`prepare` first, then `run` once, `stop` beside it."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def prepare(self, environment: Mapping[str, str]) -> int:
        """Set variables that torch reads when it is loaded; returns the process id.

        Cheaper by half a second than Ray's runtime environments, which start another kind of
        process for the same purpose.
        """
        os.environ.update(environment)
        return os.getpid()

    def run(self, config_json: str) -> None:
        """Serve until `stop`. Raises what run_worker does."""
        # Only now: they load torch, which must see the environment that `prepare` was given.
        from pagewire.cluster.ray_metrics import RayMetrics
        from pagewire.cluster.worker_process import run_worker

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        config = WorkerConfig.from_json(config_json)
        # No method here may be a coroutine: Ray would run them all on an event loop of its own.
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            runner.run(run_worker(config, self._stop, on_state=RayMetrics(config).report))

    def stop(self) -> None:
        """Make `run` return once what is under way has ended."""
        if self._loop is None:
            self._stop.set()
        else:
            self._loop.call_soon_threadsafe(self._stop.set)
