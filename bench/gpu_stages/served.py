"""Requests through real workers in processes of their own, with this process as their router.

What a client waits for is what the time ledger of the request says.
"""

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from pagewire.proto import worker_pb2 as pb
from pagewire.router.control import RouterControl
from pagewire.router.request import Request
from pagewire.router.time_ledger import Part, TimeLedger
from pagewire.worker.config import WorkerConfig

EXPOSED = (Part.GRANT_WAIT, Part.GATHER, Part.WIRE, Part.SCATTER)  # behind the last chunk
START_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request, from the router's point of view."""

    tokens: list[int]
    ttft_s: float
    exposed_s: float


@asynccontextmanager
async def workers(
    module: str, configs: Callable[[str], Sequence[WorkerConfig]]
) -> AsyncIterator[RouterControl]:
    """A router in this process, and workers that have registered with it.

    `module` runs one of them; its last argument is the worker's configuration. `configs` takes the
    address of the router.
    """
    control = RouterControl()
    started = configs(await control.start())
    # Where this process finds modules, wherever it was started from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for config in started:
            command = [sys.executable, "-m", module, config.to_json()]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
            stack.enter_context(process)  # closes its standard input, and waits
            stack.callback(process.kill)
            processes.append(process)
        try:
            async with asyncio.timeout(START_S):
                while len(await control.inspect()) < len(started):
                    if any(process.poll() is not None for process in processes):
                        raise RuntimeError("a worker has ended at its start; see what it wrote")
                    await asyncio.sleep(POLL_S)
            yield control
        finally:
            await control.stop()


async def request(control: RouterControl, prompt: Sequence[int], max_tokens: int) -> Served:
    """Send one, greedy, and wait for its end."""
    arrived = time.monotonic()
    ledger = TimeLedger(arrived=arrived)
    asked = Request(
        request_id=secrets.token_hex(16),
        token_ids=tuple(prompt),
        sampling=pb.SamplingParams(max_tokens=max_tokens, top_p=1.0),
        queue_deadline=float("inf"),
        deadline=float("inf"),
    )
    ledger.submit(arrived)
    tokens: list[int] = []
    ttft_s = 0.0
    async for update in control.submit(asked):
        now = time.monotonic()
        ledger.record(update.times, now)
        ttft_s = ttft_s or now - arrived
        tokens += update.token_ids
    parts = ledger.close(time.monotonic()).parts
    return Served(tokens=tokens, ttft_s=ttft_s, exposed_s=sum(parts[part] for part in EXPOSED))
