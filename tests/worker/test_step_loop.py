"""The step loop: which rows a step that raised is blamed on, and what overlaps."""

import asyncio
import threading
from collections.abc import Awaitable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import cast

import pytest

from pagewire.engine.batch import Batch, BatchRow, OnLayersDone, StepResult
from pagewire.engine.launched_step import LaunchedStep
from pagewire.kernels.ops import LogitsError
from pagewire.worker.core import WorkerCore
from pagewire.worker.effects import Effect
from pagewire.worker.step_loop import StepLoop


def row(name: str) -> BatchRow:
    return BatchRow(request_id=name, token_ids=[1], start=0, page_table=[0], sampling=None)


class OneBatch:
    """Of a WorkerCore what a StepLoop calls: has one batch, and keeps what became of it."""

    def __init__(self, *names: str) -> None:
        self._batch: Batch | None = Batch(rows=tuple(row(name) for name in names))
        self.failed: set[int] | None = None
        self.over = asyncio.Event()

    def next_batch(self, now: float) -> tuple[Batch | None, list[Effect]]:
        batch, self._batch = self._batch, None
        return batch, []

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        self.over.set()
        return []

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        self.failed = set(rows)
        self.over.set()
        return []


def execute(batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
    names = [item.request_id for item in batch.rows]
    if "poison" in names:
        raise ValueError("this row cannot run")
    if len(names) > 2:
        raise RuntimeError("a batch of this size cannot run")
    return StepResult(tokens=((),) * len(names))


async def run_until(loop: StepLoop, over: Awaitable[object]) -> None:
    task = asyncio.create_task(loop.run())
    await over
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("names", "blamed"),
    [
        (["good", "fine"], None),
        (["poison"], {0}),
        (["good", "poison", "fine", "poison"], {1, 3}),
        (["good", "fine", "too many"], {0, 1, 2}),
    ],
)
def test_a_step_that_raises_is_blamed_on_the_rows_that_raise_alone(
    names: list[str], blamed: set[int] | None
) -> None:
    async def run() -> OneBatch:
        core = OneBatch(*names)
        with ThreadPoolExecutor(max_workers=1) as thread:
            loop = StepLoop(
                core=cast(WorkerCore, core),
                execute=execute,
                thread=thread,
                carry_out=lambda effects: None,
            )
            await run_until(loop, core.over.wait())
        return core

    assert asyncio.run(run()).failed == blamed


class Listener(OneBatch):
    """Keeps what it hears of its step, in order, and on which thread."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.heard: list[object] = []
        self.threads: set[int] = set()

    def on_layers_done(self, num_layers: int) -> None:
        self.heard.append(num_layers)
        self.threads.add(threading.get_ident())

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        self.heard.append("done")
        return super().on_batch_done(result, now)

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        self.heard.append("failed")
        return super().on_batch_failed(rows)


@pytest.mark.parametrize("end", ["done", "failed"])
def test_layers_are_reported_on_the_event_loop_before_the_end_of_their_step(end: str) -> None:
    def execute(batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        if on_layers_done is not None:  # not when rows are run again to find out which is to blame
            for num_layers in (2, 4):
                on_layers_done(num_layers)
        if end == "failed":
            raise ValueError("this step cannot run")
        return StepResult(tokens=((),))

    async def run() -> Listener:
        core = Listener("row")
        with ThreadPoolExecutor(max_workers=1) as thread:
            loop = StepLoop(
                core=cast(WorkerCore, core),
                execute=execute,
                thread=thread,
                carry_out=lambda effects: None,
                on_layers_done=core.on_layers_done,
            )
            await run_until(loop, core.over.wait())
        return core

    core = asyncio.run(run())
    assert core.heard == [2, 4, end]
    assert core.threads == {threading.get_ident()}


def test_a_step_that_nobody_waits_for_reports_to_nobody() -> None:
    started, go_on = threading.Event(), threading.Event()

    def execute(batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        assert on_layers_done is not None
        started.set()
        go_on.wait()
        on_layers_done(2)
        return StepResult(tokens=((),))

    async def run() -> Listener:
        core = Listener("row")
        with ThreadPoolExecutor(max_workers=1) as thread:
            loop = StepLoop(
                core=cast(WorkerCore, core),
                execute=execute,
                thread=thread,
                carry_out=lambda effects: None,
                on_layers_done=core.on_layers_done,
            )
            await run_until(loop, asyncio.to_thread(started.wait))
            go_on.set()
            await asyncio.to_thread(thread.shutdown)
            await asyncio.sleep(0)
        return core

    assert asyncio.run(run()).heard == []


class Steps:
    """Of a WorkerCore what an overlapped StepLoop calls, over a list of batches; notes calls."""

    def __init__(self, *batches: Batch) -> None:
        self._batches = list(batches)
        self.calls: list[object] = []
        self.over = asyncio.Event()

    def next_batch(self, now: float) -> tuple[Batch | None, list[Effect]]:
        if not self._batches:
            self.over.set()
            return None, []
        self.calls.append("next")
        return self._batches.pop(0), []

    def next_batch_ahead(self, now: float) -> Batch | None:
        if not self._batches:
            return None
        batch = self._batches.pop(0)
        return Batch(rows=tuple(replace(row, follows=0) for row in batch.rows))

    def drop_batch_ahead(self) -> None:
        self.calls.append("drop")

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        self.calls.append(f"done {result.tokens[0][0]}")
        return []

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        self.calls.append(f"failed {sorted(rows)}")
        return []


class FakeModel:
    """Launches steps; the names of their rows say what becomes of them."""

    def __init__(self, calls: list[object]) -> None:
        self._calls = calls
        self._num_steps = 0
        self.ran_alone: list[BatchRow] = []

    def execute(self, batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        (row,) = batch.rows
        self.ran_alone.append(row)
        if row.request_id != "good":
            raise ValueError("this row cannot run")
        return StepResult(tokens=((),))

    def launch(self, batch: Batch, *, previous: LaunchedStep | None) -> LaunchedStep:
        name = batch.rows[0].request_id
        assert (previous is None) == (batch.rows[0].follows is None)
        if name == "no launch" and previous is not None:
            raise ValueError("this step cannot be launched")
        self._num_steps += 1
        self._calls.append(f"launch {self._num_steps}")
        return cast(LaunchedStep, FakeStep(batch, self._num_steps, self._calls))


class FakeStep:
    def __init__(self, batch: Batch, number: int, calls: list[object]) -> None:
        self.batch = batch
        self._number = number
        self._calls = calls

    def wait(self) -> StepResult:
        self._calls.append(f"wait {self._number}")
        if self.batch.rows[-1].request_id == "no end":
            raise LogitsError([len(self.batch.rows) - 1])
        return StepResult(tokens=((self._number,),) * len(self.batch.rows))


def overlapped(*batches: tuple[str, ...]) -> tuple[list[object], FakeModel]:
    """What is called, in order, when batches of such rows run."""

    async def run() -> tuple[list[object], FakeModel]:
        core = Steps(*(Batch(rows=tuple(map(row, names))) for names in batches))
        model = FakeModel(core.calls)
        with ThreadPoolExecutor(max_workers=1) as thread:
            loop = StepLoop(
                core=cast(WorkerCore, core),
                execute=model.execute,
                thread=thread,
                carry_out=lambda effects: None,
                launch=model.launch,
            )
            await run_until(loop, core.over.wait())
        return core.calls, model

    return asyncio.run(run())


def test_a_step_is_launched_before_the_one_before_it_is_waited_for() -> None:
    calls, _ = overlapped(("good",), ("good",), ("good",))
    assert calls == [
        *("next", "launch 1"),
        *("launch 2", "wait 1", "done 1"),
        *("launch 3", "wait 2", "done 2"),
        *("wait 3", "done 3"),
    ]


def test_a_step_that_cannot_be_launched_ahead_is_dropped() -> None:
    calls, _ = overlapped(("good",), ("no launch",), ("good",))
    assert calls == [
        *("next", "launch 1", "drop", "wait 1", "done 1"),
        *("next", "launch 2", "wait 2", "done 2"),
    ]


def test_a_step_that_fails_takes_the_one_behind_it_along_and_is_blamed_with_known_tokens() -> None:
    calls, model = overlapped(("good",), ("good", "no end"), ("good",))
    assert calls == [
        *("next", "launch 1", "launch 2", "wait 1", "done 1"),
        *("launch 3", "wait 2", "wait 3", "drop", "failed [1]"),
    ]
    assert [(each.request_id, each.follows) for each in model.ran_alone] == [
        ("good", None),
        ("no end", None),
    ]
    assert [each.token_ids for each in model.ran_alone] == [(1,), (1,)]


def test_a_step_that_does_not_end_is_seen_from_the_event_loop() -> None:
    """Its thread hangs, so somebody else must say so; rows that run alone count each for itself."""
    go_on = [threading.Event() for _ in range(3)]
    started: SimpleQueue[int] = SimpleQueue()
    now = 100.0

    def execute(batch: Batch, on_layers_done: OnLayersDone | None) -> StepResult:
        index = 0 if len(batch.rows) == 2 else int(batch.rows[0].request_id)
        started.put(index)
        go_on[index].wait()
        raise ValueError("this step cannot run")

    async def run() -> None:
        nonlocal now
        core = OneBatch("1", "2")
        with ThreadPoolExecutor(max_workers=1) as thread:
            loop = StepLoop(
                core=cast(WorkerCore, core),
                execute=execute,
                thread=thread,
                carry_out=lambda effects: None,
                clock=lambda: now,
            )
            assert loop.step_s() == 0.0
            task = asyncio.create_task(loop.run())
            for event in go_on:
                await asyncio.to_thread(started.get)
                for seconds in (0.5, 1.0):
                    now += 0.5
                    assert loop.step_s() == seconds
                event.set()
            await core.over.wait()
            assert loop.step_s() == 0.0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
