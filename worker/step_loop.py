"""The model beside the event loop: one thread that runs steps, one loop that feeds it."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

from pagewire.engine.batch import Batch, BatchRow, OnLayersDone, StepResult
from pagewire.worker.core import WorkerCore
from pagewire.worker.effects import Effect

logger = logging.getLogger(__name__)

_STEP_ERRORS = (RuntimeError, ValueError, IndexError)  # what torch and our checks raise


class StepLoop:
    """Runs batch after batch while the core has any; sleeps until it is woken otherwise.

    A forward step never delays the event loop: only the hand-over between two steps runs on it.
    """

    def __init__(
        self,
        *,
        core: WorkerCore,
        execute: Callable[[Batch, OnLayersDone | None], StepResult],
        thread: Executor,
        carry_out: Callable[[list[Effect]], None],
        on_idle: Callable[[], None] = lambda: None,
        on_layers_done: OnLayersDone = lambda num_layers: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_idle` is called on the event loop whenever there is no batch to run.

        So is `on_layers_done` while a step runs, which does not wait for it: always before the
        core is told how the step ended.
        """
        self._core = core
        self._execute = execute
        self._thread = thread
        self._carry_out = carry_out
        self._on_idle = on_idle
        self._on_layers_done = on_layers_done
        self._clock = clock
        self._running: Batch | None = None
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
                self._on_idle()
                await self._wake.wait()
                continue
            try:
                result = await self._run(batch)
            except _STEP_ERRORS:
                logger.exception("a step of %d rows failed", len(batch.rows))
                rows = await loop.run_in_executor(self._thread, self._faulty_rows, batch)
                self._carry_out(self._core.on_batch_failed(rows))
            else:
                self._carry_out(self._core.on_batch_done(result, self._clock()))

    async def _run(self, batch: Batch) -> StepResult:
        """Run a step in its thread. What it says when nobody waits for it any more is void."""
        loop = asyncio.get_running_loop()

        def report(num_layers: int) -> None:
            loop.call_soon_threadsafe(self._pass_on, batch, num_layers)

        self._running = batch
        try:
            return await loop.run_in_executor(self._thread, self._execute, batch, report)
        finally:
            self._running = None

    def _pass_on(self, batch: Batch, num_layers: int) -> None:
        if self._running is batch:
            self._on_layers_done(num_layers)

    def _faulty_rows(self, batch: Batch) -> frozenset[int]:
        """Which rows of a step that raised are to blame: those that raise alone as well.

        To run a row again does no harm, since it writes the same KV to the same slots. When only
        the batch as a whole raises, all of its rows are.
        """
        everybody = range(len(batch.rows))
        if len(everybody) == 1:
            return frozenset(everybody)
        faulty = frozenset(index for index in everybody if self._raises(batch.rows[index]))
        return faulty or frozenset(everybody)

    def _raises(self, row: BatchRow) -> bool:
        try:
            self._execute(Batch(rows=(row,)), None)
        except _STEP_ERRORS:
            return True
        return False
