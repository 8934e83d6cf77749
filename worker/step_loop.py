"""The model beside the event loop: one thread that runs steps, one loop that feeds it."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

from pagewire.engine.batch import Batch, StepResult
from pagewire.worker.core import WorkerCore
from pagewire.worker.effects import Effect

logger = logging.getLogger(__name__)


class StepLoop:
    """Runs batch after batch while the core has any; sleeps until it is woken otherwise.

    A forward step never delays the event loop: only the hand-over between two steps runs on it.
    """

    def __init__(
        self,
        *,
        core: WorkerCore,
        execute: Callable[[Batch], StepResult],
        thread: Executor,
        carry_out: Callable[[list[Effect]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._execute = execute
        self._thread = thread
        self._carry_out = carry_out
        self._clock = clock
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something has changed: there may be a batch now."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch, effects = self._core.next_batch(self._clock())
            self._carry_out(effects)
            if batch is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                result = await loop.run_in_executor(self._thread, self._execute, batch)
            except (RuntimeError, ValueError, IndexError):  # what torch and our checks raise
                logger.exception("a step of %d rows failed", len(batch.rows))
                self._carry_out(self._core.on_batch_failed())
            else:
                self._carry_out(self._core.on_batch_done(result, self._clock()))
