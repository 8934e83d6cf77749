"""What happens to streams and pages when a client, a worker or a frame goes wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from pipeline import Pipeline, outcome, pipeline, request, tcp

from pagewire.kv_transfer.landing import PIECE_BYTES, Landing
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.transport import Handler, Transport
from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import RequestFailed
from pagewire.worker.config import Role

LONG = pb.SamplingParams(max_tokens=500, top_p=1.0)
SHORT = pb.SamplingParams(max_tokens=4, top_p=1.0)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_cancelling_frees_every_page(num_tokens: int, llama: Path) -> None:
    """Before the first token, at it, and while decoding."""

    async def run(cluster: Pipeline) -> None:
        stream = cluster.control.submit(request(range(100), LONG))
        seen = 0
        if num_tokens:
            async for update in stream:
                seen += len(update.token_ids)
                if seen >= num_tokens:
                    break
        stream.cancel("the client is gone")
        stream.cancel("again")
        await cluster.until_idle()
        assert await cluster.generate(range(10), SHORT)

    run_with_pipeline(llama, run)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_streams_of_a_lost_worker_go_on_with_its_successor(name: str, llama: Path) -> None:
    prompts = [[length % 100 for length in range(500 + index)] for index in range(4)]

    async def run(cluster: Pipeline) -> None:
        expected = [await cluster.generate(prompt, LONG) for prompt in prompts]
        streams = [asyncio.create_task(cluster.generate(prompt, LONG)) for prompt in prompts]
        await cluster.until_state(name, lambda state: state.running > 0)
        lost = cluster.workers.pop(name)
        lost.stop.set()
        await lost.task
        with pytest.raises(RequestFailed, match=r"no \w+ worker is ready"):
            cluster.control.submit(request(range(5), SHORT))
        cluster.add(Role(name.removesuffix("-0")), f"{name}-again")
        assert await asyncio.gather(*streams) == expected
        await cluster.until_idle()

    run_with_pipeline(llama, run)


def test_what_waits_for_room_goes_to_a_worker_that_joins(llama: Path) -> None:
    prompt = range(100)

    async def run(cluster: Pipeline) -> None:
        first = asyncio.create_task(cluster.generate(prompt, LONG))
        await cluster.until_state("decode-0", lambda state: state.running > 0)
        second = asyncio.create_task(cluster.generate(prompt, LONG))
        await asyncio.sleep(0)
        assert cluster.control.counts()["queued"] == 1
        cluster.add(Role.DECODE, "decode-1")
        await cluster.until_state("decode-1", lambda state: state.running > 0)
        assert await first == await second

    run_with_pipeline(llama, run, num_pages=10)


def test_a_flipped_bit_in_a_frame_never_becomes_a_token(llama: Path) -> None:
    async def run(cluster: Pipeline) -> None:
        error = await outcome(cluster.generate(range(100), SHORT))
        assert error is not None
        assert error.code == "handoff_corrupt"
        await cluster.until_idle()

    run_with_pipeline(llama, run, flipping_tcp)


class _FlippingLanding(Landing):
    """Passes everything on, but flips one bit of each piece that has landed."""

    def __init__(self, landing: Landing) -> None:
        super().__init__()
        self.num_bytes = landing.num_bytes
        self._landing = landing

    @property
    def is_full(self) -> bool:
        return self._landing.is_full

    def next_piece(self, limit: int = PIECE_BYTES) -> memoryview:
        return self._landing.next_piece(limit)

    def advance(self, num_bytes: int) -> None:
        self._landing.next_piece(num_bytes)[num_bytes // 2] ^= 4
        self._landing.advance(num_bytes)


class _FlippingHandler:
    """Passes everything on, but for payloads that land changed."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        landing = self._handler.place(peer, header, length)
        return None if landing is None else _FlippingLanding(landing)

    def deliver(self, peer: bytes, header: bytes) -> None:
        self._handler.deliver(peer, header)

    def lost(self, peer: bytes, reason: str) -> None:
        self._handler.lost(peer, reason)


def flipping_tcp(incarnation: bytes, handler: Handler) -> list[Transport]:
    flipping = _FlippingHandler(handler)
    return [TcpTransport(incarnation=incarnation, handler=flipping, host="127.0.0.1")]


def run_with_pipeline(
    llama: Path,
    scenario: Callable[[Pipeline], Awaitable[None]],
    make_transports: Callable[[bytes, Handler], list[Transport]] = tcp,
    num_pages: int = 256,
) -> None:
    async def run() -> None:
        async with pipeline(llama, make_transports, num_pages=num_pages) as cluster:
            await scenario(cluster)

    asyncio.run(run())
