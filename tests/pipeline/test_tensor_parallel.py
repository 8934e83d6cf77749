"""Workers of several ranks, each in a process of its own, between a real router and each other."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
from held_copies import HeldCopies
from pipeline import Pipeline, RunningWorker
from tiny_models import VOCAB_SIZE, make_model

from pagewire.cluster import worker_process
from pagewire.cluster.worker_process import run_worker
from pagewire.engine.aggregated import generate
from pagewire.engine.load import load_engine
from pagewire.engine.parallel.rank_group import RankLost
from pagewire.engine.sampling_params import SamplingParams
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import KEY_BYTES
from pagewire.router.control import RouterControl
from pagewire.worker.config import Role, WorkerConfig

MAX_TOKENS = 8
GREEDY = pb.SamplingParams(max_tokens=MAX_TOKENS, top_p=1.0)
START_S = 120.0  # for processes that import torch, on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose KV heads are split over 2 ranks and held twice by 4."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", path, num_attention_heads=8, num_key_value_heads=2)
    return path


@asynccontextmanager
async def serving(
    model: Path,
    sizes: dict[Role, int],
    page_sizes: dict[Role, int],
    *,
    overlap_steps: bool = False,
) -> AsyncIterator[tuple[Pipeline, dict[Role, "asyncio.Task[None]"]]]:
    """A router with one worker of each role, of so many ranks."""
    control = RouterControl()
    address = await control.start()
    stop = asyncio.Event()
    tasks = {}
    for role, size in sizes.items():
        config = WorkerConfig(
            name=f"{role}-0",
            role=role,
            model=str(model),
            served_model="tiny",
            routers=(address,),
            transport="tcp",
            dtype="float32",
            tensor_parallel_size=size,
            page_size=page_sizes[role],
            num_pages=64,
            max_batch_tokens=128,
            slot_bytes=1 << 16,
            num_slots=4,
            # So that some rows have several logits, where steps are not launched ahead.
            max_draft_tokens=0 if overlap_steps else 8,
            overlap_steps=overlap_steps,
            prefix_cache_secret="5a" * KEY_BYTES,
        )
        tasks[role] = asyncio.create_task(run_worker(config, stop))
    try:
        async with asyncio.timeout(START_S):
            while len(await control.inspect()) < len(sizes):
                assert not any(task.done() for task in tasks.values()), tasks
                await asyncio.sleep(0.05)
        yield Pipeline(control=control, workers={}, start=_no_more), tasks
    finally:
        stop.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        await control.stop()


def _no_more(role: Role, name: str) -> RunningWorker:
    raise AssertionError("the workers are those that were started")


def rank_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "pagewire.worker.rank_process" in child.cmdline():
                found.append(child)
    return found


def prompts(*lengths: int) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize(
    ("prefill", "decode", "page_sizes"),
    [
        (2, 1, (16, 16)),
        (1, 2, (16, 64)),
        pytest.param(2, 4, (32, 16), marks=pytest.mark.slow),  # four more processes
    ],
)
def test_tokens_are_those_of_one_rank(
    prefill: int, decode: int, page_sizes: tuple[int, int], model: Path
) -> None:
    inputs = prompts(1, 70, 300)

    async def run() -> tuple[list[list[int]], list[list[int]]]:
        sizes = {Role.PREFILL: prefill, Role.DECODE: decode}
        async with serving(model, sizes, dict(zip(sizes, page_sizes, strict=True))) as (
            cluster,
            _,
        ):
            assert len(rank_processes()) == prefill + decode - 2
            outputs = await asyncio.gather(*(cluster.generate(item, GREEDY) for item in inputs))
            # The choices of one prompt share pages, and copy the last one on every rank.
            choices = await cluster.generate_choices(inputs[1], GREEDY, 2)
            return [tokens for tokens, _ in outputs], [tokens for tokens, _ in choices]

    found, choices = asyncio.run(run())
    runner = load_engine(model, dtype="float32", num_pages=128, page_size=16, num_threads=1)
    expected = generate(runner, inputs, SamplingParams(max_tokens=MAX_TOKENS))
    assert found == expected
    assert choices == [expected[1]] * 2
    assert not rank_processes()


@pytest.mark.parametrize(
    ("prefill", "decode", "page_sizes"),
    [
        (2, 2, (16, 16)),
        pytest.param(2, 1, (32, 16), marks=pytest.mark.slow),
        pytest.param(1, 2, (16, 64), marks=pytest.mark.slow),
        pytest.param(2, 4, (16, 16), marks=pytest.mark.slow),
    ],
)
def test_pages_of_ranks_with_a_device_each_arrive(
    prefill: int,
    decode: int,
    page_sizes: tuple[int, int],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 reaches the pools of the others by copies, in a stream for each rank.

    And decode steps are launched before the tokens of those before are read, as on GPUs.
    """
    inputs = prompts(1, 300)
    streams: list[HeldCopies] = []

    def copy_streams(config: WorkerConfig) -> tuple[HeldCopies, ...]:
        made = [HeldCopies(is_free=True) for _ in range(config.tensor_parallel_size)]
        streams.extend(made)
        return tuple(made)

    monkeypatch.setattr(worker_process, "copy_streams", copy_streams)

    async def run() -> list[list[int]]:
        sizes = {Role.PREFILL: prefill, Role.DECODE: decode}
        pages = dict(zip(sizes, page_sizes, strict=True))
        async with serving(model, sizes, pages, overlap_steps=True) as (cluster, _):
            outputs = await asyncio.gather(*(cluster.generate(item, GREEDY) for item in inputs))
            return [tokens for tokens, _ in outputs]

    found = asyncio.run(run())
    runner = load_engine(model, dtype="float32", num_pages=128, page_size=16, num_threads=1)
    assert found == generate(runner, inputs, SamplingParams(max_tokens=MAX_TOKENS))
    assert len(streams) == prefill + decode
    assert all(each.num_begun for each in streams)


def test_a_rank_that_is_killed_takes_its_worker_with_it(model: Path) -> None:
    async def run() -> None:
        sizes = {Role.PREFILL: 1, Role.DECODE: 2}
        async with serving(model, sizes, dict.fromkeys(sizes, 16)) as (_, tasks):
            [process] = rank_processes()
            process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(START_S):
                with pytest.raises(RankLost, match=r"rank [01] of 2"):
                    await tasks[Role.DECODE]

    asyncio.run(run())
    assert not rank_processes()
