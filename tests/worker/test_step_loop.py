"""The step loop: which rows a step that raised is blamed on."""

import asyncio
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from pagewire.engine.batch import Batch, BatchRow, StepResult
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


def execute(batch: Batch) -> StepResult:
    names = [item.request_id for item in batch.rows]
    if "poison" in names:
        raise ValueError("this row cannot run")
    if len(names) > 2:
        raise RuntimeError("a batch of this size cannot run")
    return StepResult(tokens=((),) * len(names))


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
            task = asyncio.create_task(loop.run())
            await core.over.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return core

    assert asyncio.run(run()).failed == blamed
