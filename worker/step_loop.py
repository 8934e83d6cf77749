"""The model beside the event loop: one thread that runs steps, one loop that feeds it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Protocol, TypeVar

from pagewire.engine.batch import Batch, BatchRow, OnLayersDone, StepResult, with_known_tokens
from pagewire.engine.launched_step import LaunchedStep
from pagewire.worker.core import WorkerCore
from pagewire.worker.effects import Effect
from pagewire.worker.step_watch import StepWatch

logger = logging.getLogger(__name__)

_STEP_ERRORS = (RuntimeError, ValueError, IndexError)  # what torch and our checks raise

Result = TypeVar("Result")


class Launch(Protocol):
    """`ModelRunner.launch`."""

    def __call__(self, batch: Batch, *, previous: LaunchedStep | None) -> LaunchedStep: ...


class StepLoop:
    """Runs batch after batch while the core has any; sleeps until it is woken otherwise.

    A forward step never delays the event loop: only the hand-over between two steps runs on it.
    With `launch` a GPU does not wait for that either: while it runs a step, the next one is
    launched, before the tokens of the first are known.
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
        launch: Launch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_idle` is called on the event loop whenever there is no batch to run.

        So is `on_layers_done` while a step runs, which does not wait for it: always before the
        core is told how the step ended. With `launch` steps are run by it and not by `execute`, and
        report no layers.
        """
        self._core = core
        self._execute = execute
        self._thread = thread
        self._carry_out = carry_out
        self._on_idle = on_idle
        self._on_layers_done = on_layers_done
        self._launch = launch
        self._clock = clock
        self._watch = StepWatch()
        self._running: Batch | None = None
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something has changed: there may be a batch now."""
        self._wake.set()

    def step_s(self) -> float:
        """Seconds for which the model's thread has been at one thing; 0 if it is not at work.

        To be asked now and then: see StepWatch.
        """
        return self._watch.look(self._clock())

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            batch, effects = self._core.next_batch(self._clock())
            self._carry_out(effects)
            if batch is None:
                self._wake.clear()
                self._on_idle()
                await self._wake.wait()
                continue
            if self._launch is not None:
                await self._run_ahead(batch, self._launch)
                continue
            try:
                result = await self._run(batch)
            except _STEP_ERRORS:
                await self._blame(batch)
            else:
                self._carry_out(self._core.on_batch_done(result, self._clock()))

    async def _run_ahead(self, batch: Batch, launch: Launch) -> None:
        """Run a step and those behind it, each launched before the one before it is waited for.

        Until the core has no step that could run ahead, or one fails.
        """
        known: StepResult | None = None  # of the step before `step`
        try:
            step: LaunchedStep | None = await self._in_thread(partial(launch, batch, previous=None))
        except _STEP_ERRORS:
            await self._blame(batch)
            return
        while step is not None:
            ahead = await self._launch_ahead(step, launch)
            try:
                result = await self._in_thread(step.wait)
            except _STEP_ERRORS:
                if ahead is not None:
                    await self._in_thread(partial(_end, ahead))
                    self._core.drop_batch_ahead()
                batch = with_known_tokens(step.batch, known) if known else step.batch
                await self._blame(batch)
                return
            self._carry_out(self._core.on_batch_done(result, self._clock()))
            step, known = ahead, result

    async def _launch_ahead(self, step: LaunchedStep, launch: Launch) -> LaunchedStep | None:
        """Launch the step behind `step`; None if there is none, or if it raises.

        Then its rows run again, in a step whose failure is theirs alone.
        """
        batch = self._core.next_batch_ahead(self._clock())
        if batch is None:
            return None
        try:
            return await self._in_thread(partial(launch, batch, previous=step))
        except _STEP_ERRORS:
            self._core.drop_batch_ahead()
            return None

    async def _blame(self, batch: Batch) -> None:
        """A step has raised: find out because of which rows, and tell the core."""
        logger.exception("a step of %d rows failed", len(batch.rows))
        rows = await self._faulty_rows(batch)
        self._carry_out(self._core.on_batch_failed(rows))

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """Each thing that the model's thread does, and has to come to an end with."""
        self._watch.begin(self._clock())
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._watch.end()

    async def _run(self, batch: Batch) -> StepResult:
        """Run a step in its thread. What it says when nobody waits for it any more is void."""
        loop = asyncio.get_running_loop()

        def report(num_layers: int) -> None:
            loop.call_soon_threadsafe(self._pass_on, batch, num_layers)

        self._running = batch
        try:
            return await self._in_thread(partial(self._execute, batch, report))
        finally:
            self._running = None

    def _pass_on(self, batch: Batch, num_layers: int) -> None:
        if self._running is batch:
            self._on_layers_done(num_layers)

    async def _faulty_rows(self, batch: Batch) -> frozenset[int]:
        """Which rows of a step that raised are to blame: those that raise alone as well.

        To run a row again does no harm, since it writes the same KV to the same slots. When only
        the batch as a whole raises, all of its rows are.
        """
        everybody = range(len(batch.rows))
        if len(everybody) == 1:
            return frozenset(everybody)
        faulty = frozenset([index for index in everybody if await self._raises(batch.rows[index])])
        return faulty or frozenset(everybody)

    async def _raises(self, row: BatchRow) -> bool:
        try:
            await self._in_thread(partial(self._execute, Batch(rows=(row,)), None))
        except _STEP_ERRORS:
            return True
        return False


def _end(step: LaunchedStep) -> None:
    """Until a step whose result is void has ended."""
    with contextlib.suppress(*_STEP_ERRORS):
        step.wait()
