"""A router and workers in one process: the real shells and gRPC, a tiny random model."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draft_costs import linear_costs

from pagewire.decode_worker.load_speculation import load_speculation
from pagewire.decode_worker.worker import DecodeWorker
from pagewire.engine.copy_stream import CopyStream
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import load_engine
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.transport import Handler, Transport
from pagewire.prefill_worker.worker import PrefillWorker
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import KEY_BYTES
from pagewire.router.control import RouterControl
from pagewire.router.request import FinishReason, Request, RequestFailed
from pagewire.worker.config import Role, WorkerConfig

MakeTransports = Callable[[bytes, Handler], Sequence[Transport]]


def tcp(incarnation: bytes, handler: Handler) -> list[Transport]:
    return [TcpTransport(incarnation=incarnation, handler=handler, host="127.0.0.1")]


@dataclass(slots=True, kw_only=True)
class RunningWorker:
    worker: PrefillWorker | DecodeWorker
    stop: asyncio.Event
    task: asyncio.Task[None]

    def num_generated(self) -> int:
        return self.worker.state().generated_tokens


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """A router with its workers. Time limits keep a fault from hanging the tests."""

    control: RouterControl
    workers: dict[str, RunningWorker]
    start: Callable[[Role, str], RunningWorker]

    def add(self, role: Role, name: str) -> None:
        """Start another worker; it registers by itself."""
        self.workers[name] = self.start(role, name)

    async def generate(
        self, prompt: Sequence[int], sampling: pb.SamplingParams
    ) -> tuple[list[int], FinishReason]:
        """All tokens of one request; checks that positions are contiguous."""
        [choice] = await self.generate_choices(prompt, sampling, 1)
        return choice

    async def generate_choices(
        self, prompt: Sequence[int], sampling: pb.SamplingParams, n: int
    ) -> list[tuple[list[int], FinishReason]]:
        """The same for each of `n` choices."""
        tokens: list[list[int]] = [[] for _ in range(n)]
        reasons: dict[int, FinishReason] = {}
        async with asyncio.timeout(60):
            async for update in self.control.submit(request(prompt, sampling, n)):
                assert update.choice not in reasons
                assert update.position == len(tokens[update.choice])
                tokens[update.choice] += update.token_ids
                if update.finish_reason is not None:
                    reasons[update.choice] = update.finish_reason
        return [(tokens[choice], reasons[choice]) for choice in range(n)]

    async def until_idle(self, names: Iterable[str] | None = None) -> None:
        """Wait until every page of the workers is free and nothing is queued or running."""
        for name in self.workers if names is None else names:
            await self.until_state(name, _is_idle)

    async def until_state(self, name: str, holds: Callable[[pb.WorkerState], bool]) -> None:
        """Wait until the state of a worker is as asked; the books are checked each time."""
        async with asyncio.timeout(10):
            while not holds(self.workers[name].worker.inspect()):
                await asyncio.sleep(0.005)

    async def until_registered(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(await self.control.inspect()) < count:
                await asyncio.sleep(0.01)


def request(prompt: Sequence[int], sampling: pb.SamplingParams, n: int = 1) -> Request:
    return Request(
        request_id=secrets.token_hex(8),
        token_ids=tuple(prompt),
        sampling=sampling,
        queue_deadline=float("inf"),
        deadline=float("inf"),
        n=n,
    )


@asynccontextmanager
async def pipeline(
    model: Path,
    make_transports: MakeTransports,
    *,
    prefill: int = 1,
    decode: int = 1,
    num_pages: int = 256,
    max_batch_tokens: int = 128,
    slot_bytes: int = 1 << 16,
    num_slots: int = 8,
    prefix_cache: bool = True,
    max_draft_tokens: int = 0,
    draft_model: Path | None = None,
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.AUTO,
    by_role: Mapping[Role, Mapping[str, Any]] | None = None,
    copies: Mapping[Role, CopyStream] | None = None,
) -> AsyncIterator[Pipeline]:
    """Start it, wait until every worker has registered, stop it in the end.

    `by_role` has fields of WorkerConfig that are to be others for the workers of a role; `copies`
    what reaches the pages of its one worker, as if they were on a device.
    """
    control = RouterControl()
    address = await control.start()

    def start(role: Role, name: str) -> RunningWorker:
        config = WorkerConfig(
            name=name,
            role=role,
            model=str(model),
            served_model="tiny",
            routers=(address,),
            dtype="float32",
            kv_cache_dtype=kv_cache_dtype,
            num_pages=num_pages,
            max_batch_tokens=max_batch_tokens,
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            max_draft_tokens=max_draft_tokens,
            draft_model=str(draft_model) if draft_model and role is Role.DECODE else None,
            prefix_cache_secret="5a" * KEY_BYTES if prefix_cache else None,
        )
        config = replace(config, **(by_role or {}).get(role, {}))
        return start_worker(config, make_transports, (copies or {}).get(role))

    cluster = Pipeline(control=control, workers={}, start=start)
    names = [(Role.PREFILL, f"prefill-{index}") for index in range(prefill)]
    names += [(Role.DECODE, f"decode-{index}") for index in range(decode)]
    for role, name in names:
        cluster.add(role, name)
    try:
        await cluster.until_registered(len(names))
        yield cluster
    finally:
        for item in cluster.workers.values():
            item.stop.set()
        await asyncio.gather(*(item.task for item in cluster.workers.values()))
        await control.stop()


def start_worker(
    config: WorkerConfig, make_transports: MakeTransports, copies: CopyStream | None = None
) -> RunningWorker:
    runner = load_engine(
        Path(config.model),
        dtype=config.dtype,
        kv_cache_dtype=config.kv_cache_dtype,
        page_size=config.page_size,
        num_pages=config.num_pages,
        num_threads=1,
    )
    incarnation = secrets.token_bytes(16)
    worker: PrefillWorker | DecodeWorker
    if config.role is Role.PREFILL:
        worker = PrefillWorker(config=config, incarnation=incarnation, runner=runner, copies=copies)
    else:
        speculation, draft_model = load_speculation(config, runner)
        if speculation is not None:  # as of a target that is far larger than these
            costs = linear_costs(0.05, per_draft=0.1 if draft_model else 0.0)
            speculation = replace(speculation, costs=costs)
        worker = DecodeWorker(
            config=config,
            incarnation=incarnation,
            runner=runner,
            copies=copies,
            speculation=speculation,
            draft_model=draft_model,
        )
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(make_transports(incarnation, worker), stop))
    return RunningWorker(worker=worker, stop=stop, task=task)


async def outcome(generation: Awaitable[object]) -> RequestFailed | None:
    """The error that a request ended with."""
    try:
        await generation
    except RequestFailed as error:
        return error
    return None


def _is_idle(state: pb.WorkerState) -> bool:
    return state.pages.free + state.pages.cached == state.pages.total and not (
        state.queued or state.running or state.handoffs
    )
