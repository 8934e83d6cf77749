"""The load generator: how prompts reach an Endpoint over time.

Closed loops keep a number of streams busy; an open loop sends on time, whatever the engine does.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from harness.streams import Endpoint, StreamTimes

Prompt = Sequence[int]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of an open loop."""

    at_s: float  # after the start of the loop
    prompt: Prompt
    max_tokens: int


async def closed_loop(
    endpoint: Endpoint, prompts: Iterable[Prompt], *, num_streams: int, max_tokens: int
) -> list[StreamTimes]:
    """Send all prompts, `num_streams` at a time; each stream takes the next when one is done.

    Raises StreamError as soon as one of them fails.
    """
    rest = iter(prompts)

    async def run() -> list[StreamTimes]:
        return [await endpoint.stream(prompt, max_tokens) for prompt in rest]

    return [
        stream for each in await _together(run() for _ in range(num_streams)) for stream in each
    ]


async def open_loop(endpoint: Endpoint, arrivals: Iterable[Arrival]) -> list[StreamTimes]:
    """Send each request at its time, and return when all have ended, in the order of arrival.

    Raises StreamError as soon as one of them fails.
    """
    start = time.perf_counter()

    async def run(arrival: Arrival) -> StreamTimes:
        await asyncio.sleep(start + arrival.at_s - time.perf_counter())
        return await endpoint.stream(arrival.prompt, arrival.max_tokens)

    return await _together(run(arrival) for arrival in arrivals)


@asynccontextmanager
async def steady_prefills(
    endpoint: Endpoint, prompts: Iterable[Prompt], *, interval_s: float
) -> AsyncIterator[list[StreamTimes]]:
    """Send a prompt every `interval_s` seconds, one output token each, while the block runs.

    An engine that takes longer gets the next prompt when it is done, so that no queue builds up.
    Yields the list of those that have ended. At the end of the block no more are sent, and the one
    under way is waited for. Raises StreamError then if one of them failed.
    """
    ended: list[StreamTimes] = []
    stopped = asyncio.Event()

    async def send_all() -> None:
        for prompt in prompts:
            next_at = time.perf_counter() + interval_s
            ended.append(await endpoint.stream(prompt, 1))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), next_at - time.perf_counter())
            if stopped.is_set():
                return

    sending = asyncio.create_task(send_all())
    try:
        yield ended
    finally:
        stopped.set()
        await sending


async def _together(runs: Iterable[Coroutine[None, None, Result]]) -> list[Result]:
    """Run all at once; when one fails, cancel the others and raise its exception itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run) for run in runs]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
