"""Workers whose pages are on a device: what travels, and that nothing does before its time.

The device is the CPU, and makes its copies when a test says so.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from greedy_prompts import SAMPLING, expected, prompts, tokens_of
from held_copies import HeldCopies
from pipeline import pipeline, request, tcp

from pagewire.worker.config import Role


@pytest.mark.parametrize("roles", [(Role.PREFILL,), (Role.DECODE,), tuple(Role)])
@pytest.mark.parametrize(
    "decode", [{}, {"page_size": 16}, {"page_size": 128, "num_slots": 1}], ids=str
)
def test_tokens_are_those_of_one_engine(
    llama: Path, roles: tuple[Role, ...], decode: dict[str, Any]
) -> None:
    """One kind of worker or both on a device, with equal pages or not."""
    inputs = prompts(1, 64, 200, 500)
    copies = {role: HeldCopies(is_free=True) for role in roles}

    async def run() -> list[list[int]]:
        async with pipeline(
            llama, tcp, copies=copies, by_role={Role.DECODE: decode}, prefix_cache=False
        ) as cluster:
            return await tokens_of(cluster, inputs)

    assert asyncio.run(run()) == expected(llama, inputs)
    assert all(each.num_begun for each in copies.values())


def test_nothing_leaves_before_the_device_has_computed_and_copied_it(llama: Path) -> None:
    copies = HeldCopies()
    (prompt,) = prompts(100)  # one step

    async def run() -> list[int]:
        async with pipeline(llama, tcp, copies={Role.PREFILL: copies}) as cluster:
            generation = asyncio.create_task(cluster.generate(prompt, SAMPLING))
            await asyncio.to_thread(copies.await_held, 1)
            # All of it is computed as far as the host knows: the step did not wait.
            await cluster.until_state(
                "prefill-0", lambda state: state.generated_tokens == 1 and not state.running
            )
            [transfers] = cluster.workers["prefill-0"].worker.state().transfers
            assert transfers.bytes_sent == 0
            copies.free()
            tokens, _ = await generation
            await cluster.until_idle()
            return tokens

    assert [asyncio.run(run())] == expected(llama, [prompt])


def test_the_host_is_one_step_ahead_of_the_device_at_most(llama: Path) -> None:
    """So a prompt that comes later does not wait until the device has done with all others."""
    copies = HeldCopies()
    (prompt,) = prompts(300)  # three steps

    async def run() -> list[int]:
        async with pipeline(llama, tcp, copies={Role.PREFILL: copies}) as cluster:
            worker = cluster.workers["prefill-0"].worker
            generation = asyncio.create_task(cluster.generate(prompt, SAMPLING))
            await asyncio.to_thread(copies.await_marks, 2)
            assert worker.state().prompt_tokens == 128  # of the first; the second runs on
            copies.free()
            tokens, _ = await generation
            await cluster.until_idle()
            return tokens

    assert [asyncio.run(run())] == expected(llama, [prompt])


def test_nothing_commits_before_the_device_has_the_pages(llama: Path) -> None:
    copies = HeldCopies()
    (prompt,) = prompts(200)

    async def run() -> list[int]:
        async with pipeline(llama, tcp, copies={Role.DECODE: copies}) as cluster:
            generation = asyncio.create_task(cluster.generate(prompt, SAMPLING))
            await asyncio.to_thread(copies.await_held, 1)
            state = cluster.workers["decode-0"].worker.inspect()
            assert (state.handoffs, state.running, state.generated_tokens) == (1, 0, 0)
            copies.free()
            tokens, _ = await generation
            await cluster.until_idle()
            return tokens

    assert [asyncio.run(run())] == expected(llama, [prompt])


@pytest.mark.parametrize("role", Role)
def test_an_abort_quarantines_pages_until_the_device_has_done_with_them(
    llama: Path, role: Role
) -> None:
    copies = HeldCopies()
    (prompt,) = prompts(100)  # one step
    name = f"{role}-0"

    async def run() -> None:
        async with pipeline(llama, tcp, copies={role: copies}, prefix_cache=False) as cluster:
            aborted = request(prompt, SAMPLING)
            cluster.control.submit(aborted)
            await asyncio.to_thread(copies.await_held, 1)
            cluster.control.cancel(aborted.request_id, "test")
            await cluster.until_state(
                name, lambda state: not (state.handoffs or state.running or state.queued)
            )
            assert cluster.workers[name].worker.inspect().pages.quarantined > 0
            copies.free()
            await cluster.until_idle()

    asyncio.run(run())
