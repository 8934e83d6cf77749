"""What a client waits for behind its first token: the exposed part of a hand-off.

Two clusters serve the same prompts in turns, each a prefill and a decode worker in processes of
their own with the default model. One sends the KV of a prompt's last chunk by groups of layers
while it is computed, the other when its step has ended. Over the transport as it is, and as over
slower links. Figures are medians over the rounds.
"""

import argparse
import asyncio
import json
import random
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.process import run_async
from harness.slow_link import SlowTransport
from harness.table import markdown_table, number
from pagewire.decode_worker.worker import DecodeWorker
from pagewire.engine.load import load_engine
from pagewire.engine.loading.resolve import resolve_model
from pagewire.engine.precision import default_dtype
from pagewire.kv_transfer.select import create_transports
from pagewire.kv_transfer.transport import Transport
from pagewire.prefill_worker.worker import PrefillWorker
from pagewire.proto import worker_pb2 as pb
from pagewire.router.control import RouterControl
from pagewire.router.request import Request
from pagewire.router.time_ledger import Part, TimeLedger
from pagewire.worker.config import Role, WorkerConfig

EXPOSED = (Part.GRANT_WAIT, Part.GATHER, Part.WIRE, Part.SCATTER)
NUM_OUTPUT_TOKENS = 8
START_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prompt length over one link, with and without layer groups."""

    link: str
    num_prompt_tokens: int
    by_layers: bool
    ttft_ms: float
    prefill_ms: float
    exposed_ms: float  # grant wait, gather, wire and scatter behind the last chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request, in seconds."""

    ttft_s: float
    prefill_s: float
    exposed_s: float


# --- The workers ----------------------------------------------------------------------------------


async def run_worker(config: WorkerConfig, bytes_per_s: float) -> None:
    """Serve until the process is killed; a rate of 0 is that of the transport."""
    runner = load_engine(
        Path(config.model),
        dtype=config.dtype,
        num_pages=config.num_pages,
        num_threads=config.num_threads,
    )
    make = PrefillWorker if config.role is Role.PREFILL else DecodeWorker
    incarnation = secrets.token_bytes(16)
    worker = make(config=config, incarnation=incarnation, runner=runner)
    chosen = create_transports(config.transport, incarnation, worker, config.host)
    transports: list[Transport] = [*chosen.transports]
    if bytes_per_s:
        transports = [SlowTransport(each, bytes_per_s=bytes_per_s) for each in transports]
    await worker.run(transports, asyncio.Event())


@asynccontextmanager
async def cluster(
    *, by_layers: bool, transport: str, bytes_per_s: float, num_threads: int
) -> AsyncIterator[RouterControl]:
    """A router in this process, and two workers that have registered with it."""
    control = RouterControl()
    address = await control.start()
    with ExitStack() as stack:
        for role in Role:
            config = WorkerConfig(
                name=f"{role}-0",
                role=role,
                model=str(resolve_model(None)),
                served_model="bench",
                routers=(address,),
                transport=transport,
                dtype=default_dtype("cpu"),
                num_pages=100,
                num_threads=num_threads,
                stream_layers=by_layers,
            )
            arguments = ["--worker", config.to_json(), "--bytes-per-s", str(bytes_per_s)]
            process = subprocess.Popen([sys.executable, __file__, *arguments])
            stack.callback(process.wait)
            stack.callback(process.kill)
        async with asyncio.timeout(START_S):
            while len(await control.inspect()) < len(Role):
                await asyncio.sleep(0.1)
        try:
            yield control
        finally:
            await control.stop()


# --- The requests ---------------------------------------------------------------------------------


async def serve(control: RouterControl, prompt: tuple[int, ...]) -> Sample:
    """One request, alone."""
    arrived = time.monotonic()
    ledger = TimeLedger(arrived=arrived)
    request = Request(
        request_id=secrets.token_hex(16),
        token_ids=prompt,
        sampling=pb.SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, top_p=1.0),
        queue_deadline=float("inf"),
        deadline=float("inf"),
    )
    ledger.submit(arrived)
    ttft_s = 0.0
    async for update in control.submit(request):
        now = time.monotonic()
        ledger.record(update.times, now)
        ttft_s = ttft_s or now - arrived
    parts = ledger.close(time.monotonic()).parts
    return Sample(
        ttft_s=ttft_s,
        prefill_s=parts[Part.PREFILL],
        exposed_s=sum(parts[part] for part in EXPOSED),
    )


async def measure(
    transport: str, bytes_per_s: float, lengths: list[int], num_rounds: int, num_threads: int
) -> list[Run]:
    """Both clusters in turns, so that a busy machine slows both."""
    link = f"{transport} at {bytes_per_s / 1e6:.0f} MB/s" if bytes_per_s else transport
    source = random.Random(0)
    samples: dict[tuple[int, bool], list[Sample]] = {}
    async with (
        cluster(
            by_layers=False, transport=transport, bytes_per_s=bytes_per_s, num_threads=num_threads
        ) as whole,
        cluster(
            by_layers=True, transport=transport, bytes_per_s=bytes_per_s, num_threads=num_threads
        ) as layered,
    ):
        for length in lengths:
            for number_of_round in range(num_rounds + 1):
                prompt = tuple(source.choices(range(1000, 40_000), k=length))
                for by_layers, control in ((False, whole), (True, layered)):
                    sample = await serve(control, prompt)
                    if number_of_round:  # the first one warms up
                        samples.setdefault((length, by_layers), []).append(sample)
    return [
        Run(
            link=link,
            num_prompt_tokens=length,
            by_layers=by_layers,
            ttft_ms=1e3 * statistics.median(sample.ttft_s for sample in found),
            prefill_ms=1e3 * statistics.median(sample.prefill_s for sample in found),
            exposed_ms=1e3 * statistics.median(sample.exposed_s for sample in found),
        )
        for (length, by_layers), found in samples.items()
    ]


def table(runs: list[Run]) -> str:
    header = ["link", "prompt", "last chunk", "TTFT ms", "prefill ms", "exposed ms", "of TTFT"]
    rows = [
        [
            run.link,
            str(run.num_prompt_tokens),
            "by layers" if run.by_layers else "whole",
            number(run.ttft_ms),
            number(run.prefill_ms),
            number(run.exposed_ms, 2),
            f"{run.exposed_ms / run.ttft_ms:.1%}",
        ]
        for run in runs
    ]
    return markdown_table(header, rows)


async def run_all(arguments: argparse.Namespace) -> list[Run]:
    runs: list[Run] = []
    for rate in arguments.rates:
        runs += await measure(
            arguments.transport, rate * 1e6, arguments.lengths, arguments.rounds, arguments.threads
        )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="one link, fewer rounds")
    parser.add_argument("--transport", default="tcp", help="as of `pagewire serve`")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0, 1000, 125], help="MB/s; 0: as it is"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2000], help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--worker", type=WorkerConfig.from_json, help=argparse.SUPPRESS)
    parser.add_argument("--bytes-per-s", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(run_worker(arguments.worker, arguments.bytes_per_s))
        return
    if arguments.quick:
        arguments.rates, arguments.lengths, arguments.rounds = [125], [512], 3
    runs = run_async(run_all(arguments))
    print(table(runs))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=2) + "\n")


if __name__ == "__main__":
    main()
