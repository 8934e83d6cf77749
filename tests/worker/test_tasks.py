"""Background tasks: the first failure is everybody's."""

import asyncio

import pytest

from pagewire.worker.tasks import TaskSet, first_of


async def wait_forever() -> None:
    await asyncio.Event().wait()


async def fail(text: str) -> None:
    raise ValueError(text)


def test_the_first_failure_is_raised() -> None:
    async def run() -> None:
        tasks = TaskSet()
        tasks.spawn(wait_forever())
        tasks.spawn(fail("first"))
        with pytest.raises(ValueError, match="first"):
            await tasks.failure()
        await tasks.cancel()

    asyncio.run(run())


def test_what_a_block_raises_is_a_failure_too() -> None:
    async def run() -> None:
        tasks = TaskSet()
        with pytest.raises(ValueError, match="in a callback"), tasks:
            raise ValueError("in a callback")
        with pytest.raises(ValueError, match="in a callback"):
            await tasks.failure()

    asyncio.run(run())


def test_cancelled_tasks_are_no_failure() -> None:
    async def run() -> None:
        tasks = TaskSet()
        task = tasks.spawn(wait_forever())
        failure = asyncio.create_task(tasks.failure())
        await tasks.cancel()
        assert task.cancelled()
        with pytest.raises(asyncio.CancelledError):
            await failure

    asyncio.run(run())


def test_first_of_ends_the_others() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def long() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        with pytest.raises(ValueError, match="broken"):
            await first_of(long(), fail("broken"))
        assert ended.is_set()

    asyncio.run(run())
