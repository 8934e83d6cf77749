"""A prefill and a decode worker in processes of their own on one device, as they would be served.

Both are real workers with the same random model; this process is their router. What a client waits
for is what the time ledger of the request says.
"""

import asyncio
import gc
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

import torch

from gpu_stages.measurement import Measurement
from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import Scale
from pagewire.engine.aggregated import generate
from pagewire.engine.sampling_params import SamplingParams
from pagewire.proto import worker_pb2 as pb
from pagewire.router.control import RouterControl
from pagewire.router.request import Request
from pagewire.router.time_ledger import Part, TimeLedger
from pagewire.worker.config import Role, WorkerConfig

EXPOSED = (Part.GRANT_WAIT, Part.GATHER, Part.WIRE, Part.SCATTER)  # behind the last chunk
MAX_EXPOSED_SHARE = 5.0  # percent of TTFT
START_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request, from the router's point of view."""

    tokens: list[int]
    ttft_s: float
    exposed_s: float


def measure(scale: Scale, prompt: Sequence[int], max_tokens: int) -> Iterator[Measurement]:
    """`prompt` is handed over as often as the scale repeats it, after once to warm up."""
    expected = _alone(scale, prompt, max_tokens)
    runs = asyncio.run(_serve(scale, prompt, max_tokens))
    yield Measurement(
        name="two processes: tokens that differ from those of one engine",
        value=float(sum(run.tokens != expected for run in runs)),
        unit="",
        limit=0.0,
    )
    warm = runs[1:]
    ttft_s = statistics.median(run.ttft_s for run in warm)
    exposed_s = statistics.median(run.exposed_s for run in warm)
    yield Measurement(name="two processes: TTFT", value=1e3 * ttft_s, unit="ms")
    yield Measurement(name="two processes: exposed hand-off", value=1e3 * exposed_s, unit="ms")
    yield Measurement(
        name="two processes: exposed hand-off, share of TTFT",
        value=100 * exposed_s / ttft_s,
        unit="% of time",
        limit=MAX_EXPOSED_SHARE,
    )


def _alone(scale: Scale, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What one engine generates. Its memory is free again behind it."""
    runner = runner_of(random_model(scale), scale, _num_pages(scale, prompt, max_tokens))
    sampling = SamplingParams(max_tokens=max_tokens)
    (tokens,) = generate(runner, [prompt], sampling, chunk_size=len(prompt))
    del runner
    gc.collect()
    if scale.device == "cuda":
        torch.cuda.empty_cache()
    return tokens


def _num_pages(scale: Scale, prompt: Sequence[int], max_tokens: int) -> int:
    return -(-(len(prompt) + max_tokens) // scale.page_size) + 1


async def _serve(scale: Scale, prompt: Sequence[int], max_tokens: int) -> list[Served]:
    num_pages = 2 * _num_pages(scale, prompt, max_tokens)  # of this request and the one before
    async with _workers(scale, num_pages, max_batch_tokens=len(prompt)) as control:
        return [await _request(control, prompt, max_tokens) for _ in range(scale.num_handovers)]


@asynccontextmanager
async def _workers(
    scale: Scale, num_pages: int, *, max_batch_tokens: int
) -> AsyncIterator[RouterControl]:
    """A router in this process and two workers that have registered with it."""
    control = RouterControl()
    address = await control.start()
    # Where this process finds modules, wherever it was started from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for role in Role:
            config = WorkerConfig(
                name=f"{role}-0",
                role=role,
                model="random",
                served_model="check",
                routers=(address,),
                device=scale.device,
                dtype=scale.dtype,
                page_size=scale.page_size,
                num_pages=num_pages,
                max_batch_tokens=max(max_batch_tokens, scale.page_size),
                max_batch_size=1,
                num_slots=scale.num_slots,
            )
            command = [sys.executable, "-m", "gpu_stages.handoff_worker", config.to_json()]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
            stack.enter_context(process)  # closes its standard input, and waits
            stack.callback(process.kill)
            processes.append(process)
        try:
            async with asyncio.timeout(START_S):
                while len(await control.inspect()) < len(Role):
                    if any(process.poll() is not None for process in processes):
                        raise RuntimeError("a worker has ended at its start; see what it wrote")
                    await asyncio.sleep(POLL_S)
            yield control
        finally:
            await control.stop()


async def _request(control: RouterControl, prompt: Sequence[int], max_tokens: int) -> Served:
    arrived = time.monotonic()
    ledger = TimeLedger(arrived=arrived)
    request = Request(
        request_id=secrets.token_hex(16),
        token_ids=tuple(prompt),
        sampling=pb.SamplingParams(max_tokens=max_tokens, top_p=1.0),
        queue_deadline=float("inf"),
        deadline=float("inf"),
    )
    ledger.submit(arrived)
    tokens: list[int] = []
    ttft_s = 0.0
    async for update in control.submit(request):
        now = time.monotonic()
        ledger.record(update.times, now)
        ttft_s = ttft_s or now - arrived
        tokens += update.token_ids
    parts = ledger.close(time.monotonic()).parts
    return Served(tokens=tokens, ttft_s=ttft_s, exposed_s=sum(parts[part] for part in EXPOSED))
