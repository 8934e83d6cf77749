"""Workers whose pages go from device to device over UCX, and those that cannot do so.

The devices are the CPU: UCX finds out for itself that their memory is the host's.
"""

import asyncio
import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from greedy_prompts import SAMPLING, expected, prompts, tokens_of
from held_copies import HeldCopies
from pipeline import pipeline

from pagewire.kv_transfer.select import probe
from pagewire.kv_transfer.transport import Handler, Transport
from pagewire.kv_transfer.ucx import UcxTransport
from pagewire.kv_transfer.ucx_library import UcxLibrary
from pagewire.prefill_worker.worker import PrefillWorker
from pagewire.worker.config import Role

pytestmark = pytest.mark.skipif(not probe().usable, reason="ucxx is not installed")

LOOPBACK = "127.0.0.1"


class WatchedCopies(HeldCopies):
    """Counts what is lent to transports."""

    def __init__(self, *, is_free: bool = False) -> None:
        super().__init__(is_free=is_free)
        self.num_lent = 0

    def lend(self, data: Any) -> Any:
        self.num_lent += 1
        return super().lend(data)


@pytest.fixture(autouse=True)
def ucx_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UcxLibrary, "moves_gpu_memory", True)


def ucx(on_device: Collection[Role], incarnation: bytes, handler: Handler) -> list[Transport]:
    role = Role.PREFILL if isinstance(handler, PrefillWorker) else Role.DECODE
    settle = (lambda: None) if role in on_device else None
    return [
        UcxTransport(incarnation=incarnation, handler=handler, host=LOOPBACK, settle_device=settle)
    ]


def ways(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What each end with a device has said about its connection."""
    return [
        record.message.partition(": ")[2]
        for record in caplog.records
        if record.name == "pagewire.kv_transfer.ucx"
    ]


def run(path: Path, copies: dict[Role, HeldCopies], decode: dict[str, Any]) -> None:
    """Serve prompts with these devices; the tokens must be those of one engine."""
    inputs = prompts(1, 200, 500)

    async def tokens() -> list[list[int]]:
        transports = partial(ucx, set(copies))
        by_role = {Role.DECODE: decode}
        async with pipeline(
            path, transports, copies=dict(copies), by_role=by_role, prefix_cache=False
        ) as cluster:
            return await tokens_of(cluster, inputs)

    assert asyncio.run(tokens()) == expected(path, inputs)


@pytest.mark.parametrize("decode", [{}, {"page_size": 16}, {"num_slots": 1}], ids=str)
def test_tokens_are_those_of_one_engine(
    llama: Path, decode: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    copies = {role: WatchedCopies(is_free=True) for role in Role}
    with caplog.at_level(logging.INFO, "pagewire.kv_transfer.ucx"):
        run(llama, dict(copies), decode)
    assert all(each.num_lent for each in copies.values())
    assert ways(caplog) == ["pages go from GPU to GPU"] * 2


@pytest.mark.parametrize("role", Role)
def test_a_peer_with_pages_in_host_memory_gets_them_through_it(
    llama: Path, role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    copies = WatchedCopies(is_free=True)
    with caplog.at_level(logging.INFO, "pagewire.kv_transfer.ucx"):
        run(llama, {role: copies}, {})
    assert copies.num_begun and not copies.num_lent
    [way] = ways(caplog)
    assert way.startswith("pages go through pinned host memory, since the peer has them there")


def test_a_ucx_without_cuda_moves_host_memory(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(UcxLibrary, "moves_gpu_memory", False)
    copies = {role: WatchedCopies(is_free=True) for role in Role}
    with caplog.at_level(logging.INFO, "pagewire.kv_transfer.ucx"):
        run(llama, dict(copies), {})
    assert all(each.num_begun and not each.num_lent for each in copies.values())
    assert len(ways(caplog)) == 2
    assert all("UCX has no CUDA here" in way for way in ways(caplog))


def test_nothing_leaves_before_the_device_has_copied_and_summed_it(llama: Path) -> None:
    copies = {Role.PREFILL: HeldCopies(), Role.DECODE: HeldCopies(is_free=True)}
    (prompt,) = prompts(64)  # one frame

    async def tokens() -> list[int]:
        async with pipeline(llama, partial(ucx, tuple(Role)), copies=dict(copies)) as cluster:
            held = copies[Role.PREFILL]
            generation = asyncio.create_task(cluster.generate(prompt, SAMPLING))
            await asyncio.to_thread(held.await_held, 2)  # a copy, and its checksum behind it
            await cluster.until_state("prefill-0", lambda state: state.generated_tokens == 1)
            for mark in held.marks:
                mark.come()
            held.release(1)  # the copy alone
            [transfers] = cluster.workers["prefill-0"].worker.state().transfers
            assert transfers.bytes_sent == 0
            held.free()
            found, _ = await generation
            await cluster.until_idle()
            return found

    assert [asyncio.run(tokens())] == expected(llama, [prompt])


def test_nothing_commits_before_the_device_has_verified_and_scattered_it(llama: Path) -> None:
    copies = {Role.PREFILL: HeldCopies(is_free=True), Role.DECODE: HeldCopies()}
    (prompt,) = prompts(64)  # one frame

    async def tokens() -> list[int]:
        async with pipeline(llama, partial(ucx, tuple(Role)), copies=dict(copies)) as cluster:
            held = copies[Role.DECODE]
            generation = asyncio.create_task(cluster.generate(prompt, SAMPLING))
            await asyncio.to_thread(held.await_held, 1)
            held.release(1)  # the checksum
            await asyncio.to_thread(held.await_held, 1)
            state = cluster.workers["decode-0"].worker.inspect()
            assert (state.handoffs, state.running, state.generated_tokens) == (1, 0, 0)
            held.free()
            found, _ = await generation
            await cluster.until_idle()
            return found

    assert [asyncio.run(tokens())] == expected(llama, [prompt])
