import asyncio

import pytest
from starlette.types import Message

from pagewire.router.disconnect import DisconnectScope


class Client:
    """The receiving end of a connection."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def test_the_block_ends_where_it_waits_and_the_task_goes_on() -> None:
    async def scenario() -> list[str]:
        client, steps = Client(), []
        async with DisconnectScope(client.receive):
            steps.append("begun")
            client.gone.set()
            try:
                await asyncio.Event().wait()
            finally:
                steps.append("ended")
        await asyncio.sleep(0)  # not cancelled any more
        steps.append("after")
        return steps

    assert asyncio.run(scenario()) == ["begun", "ended", "after"]


def test_a_block_that_is_done_is_left_alone() -> None:
    async def scenario() -> str:
        client = Client()
        async with DisconnectScope(client.receive):
            result = "done"
        client.gone.set()
        await asyncio.sleep(0)
        return result

    assert asyncio.run(scenario()) == "done"


def test_errors_of_the_block_pass() -> None:
    async def scenario() -> None:
        async with DisconnectScope(Client().receive):
            raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(scenario())


def test_a_cancellation_from_outside_passes_even_after_a_disconnect() -> None:
    async def scenario() -> bool:
        client, waiting = Client(), asyncio.Event()

        async def work() -> None:
            async with DisconnectScope(client.receive):
                waiting.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await waiting.wait()
        client.gone.set()
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert asyncio.run(scenario())
