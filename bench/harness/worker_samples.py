"""What the decode workers of a Pagewire server hold over time, read from /admin/workers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSample:
    """All decode workers together at one moment."""

    at_s: float  # after sampling began
    used_pages: int  # held by requests, or by operations on them
    cached_pages: int  # held by nobody: kept for prompts that begin alike, until they are needed
    total_pages: int
    running: int  # sequences of the batch
    queued: int  # in all workers, prefill workers included


@asynccontextmanager
async def sampled(url: str, *, interval_s: float) -> AsyncIterator[list[DecodeSample]]:
    """Read the workers every `interval_s` seconds while the block runs; yields the growing list."""
    samples: list[DecodeSample] = []
    start = time.perf_counter()

    async def sample() -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            while True:
                workers = (await client.get("/admin/workers")).json()["workers"]
                samples.append(decode_sample(workers, at_s=time.perf_counter() - start))
                await asyncio.sleep(interval_s)

    sampling = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling


def decode_sample(workers: Sequence[Mapping[str, Any]], *, at_s: float) -> DecodeSample:
    """The sum over the decode workers of one answer."""
    decode = [worker for worker in workers if worker["role"] == "decode"]
    pages = [worker["pages"] for worker in decode]
    return DecodeSample(
        at_s=at_s,
        used_pages=sum(each["total"] - each["free"] - each["cached"] for each in pages),
        cached_pages=sum(each["cached"] for each in pages),
        total_pages=sum(each["total"] for each in pages),
        running=sum(worker["running"] for worker in decode),
        queued=sum(worker["queued"] for worker in workers),
    )
