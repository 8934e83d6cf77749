"""Recorded steps of several ranks: a sum is in a recording on all of them or on none.

NCCL asks for that. Here the ranks are threads, their sums go over gloo, and a step runs in place of
its graph.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar, cast
from weakref import WeakSet

import pytest
from tiny_models import make_model
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from gpu_stages.eager_recording import capture
from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow, PageCopy
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.process_group import ProcessGroup, join_group
from pagewire.engine.parallel.tensor_parallel import Followers, NoFollowers, TensorParallel
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.step_memory import StepArrays
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import AttentionBatch, Recording, RenewablePlan
from pagewire.kernels.torch_ops import TorchOps
from pagewire.worker.rank_process import RankZero, follow
from pagewire.worker.step_messages import Copies, Message, Step, WarmUp, decode

T = TypeVar("T")

PAGE_SIZE, NUM_PAGES = 16, 6
MAX_ROWS = 2
TIMEOUT_S = 120.0
ROW = BatchRow(request_id="", token_ids=[5], start=0, page_table=[1], sampling=SamplingParams())


class Recorder:
    """Implements StepRecorder for steps of as many rows as there are in a bucket.

    Remembers what its recordings were used for.
    """

    buckets = (1, MAX_ROWS)

    def __init__(self) -> None:
        self.num_made = 0
        self.shapes: list[tuple[int, ...]] = []  # of what replays returned
        self.living: WeakSet[Recording] = WeakSet()

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> RenewablePlan:
        return _NewPlans(batch, scale, window)

    def record(self, step: Callable[[], Tensor]) -> Recording:
        self.num_made += 1
        recording = _Watched(capture(step), self.shapes)
        self.living.add(recording)
        return recording


class _NewPlans:
    """Implements RenewablePlan."""

    has_run = True

    def __init__(self, batch: AttentionBatch, scale: float, window: int | None) -> None:
        self._make = partial(TorchOps().plan_attention, scale=scale, window=window)
        self._plan = self._make(batch)

    def run(self, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        return self._plan.run(q, pool, layer)

    def renew(self, batch: AttentionBatch) -> None:
        self._plan = self._make(batch)


class _Watched:
    """Implements Recording."""

    def __init__(self, recording: Recording, shapes: list[tuple[int, ...]]) -> None:
        self._recording = recording
        self._shapes = shapes
        self.output = recording.output

    def replay(self) -> Tensor:
        output = self._recording.replay()
        self._shapes.append(tuple(output.shape))
        return output


class RecordableOps(TorchOps):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @property
    def recorder(self) -> Recorder:  # type: ignore[override]  # which TorchOps has not
        return self._recorder


class ThreadFollowers:
    """Implements Followers, and what a rank hears of rank 0, through the bytes of messages."""

    def __init__(self) -> None:
        self.said: SimpleQueue[bytes | None] = SimpleQueue()

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        self.said.put(Copies(copies=tuple(copies)).encode())

    def warm_up(self, max_rows: int) -> None:
        self.said.put(WarmUp(max_rows=max_rows).encode())

    def run(self, arrays: StepArrays, *, by_layer: bool, is_fed: bool) -> None:
        step = Step.of(arrays, num_threads=1, by_layer=by_layer, is_fed=is_fed)
        self.said.put(step.encode())

    def messages(self) -> Iterator[Message]:
        while (message := self.said.get()) is not None:
            yield decode(message[4:])


def load(
    path: Path, group: ProcessGroup | None, followers: Followers, recorder: Recorder
) -> ModelRunner:
    plain = load_engine(
        path,
        dtype="float32",
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        num_threads=1,
        kernels="torch",
        max_model_len=64,
        parallel=TensorParallel(group=group) if group else None,
    )
    plain.kv_cache.pool.zero_()
    plain.model.ops = RecordableOps(recorder)
    return ModelRunner(
        plain.model,
        plain.kv_cache,
        layout=plain.layout,
        followers=followers,
        max_model_len=plain.max_model_len,
        digest=plain.digest,
    )


def run_steps(runner: ModelRunner) -> tuple[list[int], list[int]]:
    """Tokens of a recorded step and of one that reports its layers, and these reports."""
    layers: list[int] = []
    recorded = runner.execute(Batch(rows=(ROW,)))
    reported = runner.execute(Batch(rows=(ROW,), layer_group_ends=(1, 2)), layers.append)
    return [recorded.tokens[0][0], reported.tokens[0][0]], layers


def on_two_ranks(path: Path, lead: Callable[[ModelRunner], T]) -> tuple[T, list[Recorder]]:
    """What `lead` returns for rank 0, which another follows."""
    store, followers = HashStore(), ThreadFollowers()
    recorders = [Recorder(), Recorder()]

    def be_first() -> T:
        runner = load(path, join_group(store, 0, 2), followers, recorders[0])
        try:
            return lead(runner)
        finally:
            followers.said.put(None)

    def be_second() -> None:
        runner = load(path, join_group(store, 1, 2), NoFollowers(), recorders[1])
        follow(runner, cast(RankZero, followers))

    with ThreadPoolExecutor(2) as threads:
        leading, following = threads.submit(be_first), threads.submit(be_second)
        following.result(timeout=TIMEOUT_S)
        return leading.result(timeout=TIMEOUT_S), recorders


def test_ranks_record_and_replay_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama", tmp_path)
    monkeypatch.setattr(ProcessGroup, "is_recordable", True)

    def lead(runner: ModelRunner) -> tuple[list[int], list[int]]:
        runner.warm_up(MAX_ROWS)
        return run_steps(runner)

    found, recorders = on_two_ranks(tmp_path, lead)
    alone = load(tmp_path, None, NoFollowers(), Recorder())
    assert found == run_steps(alone) == ([found[0][0]] * 2, [1, 2])
    # Rank 0 also records the choice of tokens, for each number of rows.
    assert [each.num_made for each in recorders] == [4, 2]
    logits, tokens = recorders[0].shapes
    assert (logits[0], tokens) == (1, (1,))
    [part_of_logits] = recorders[1].shapes
    assert part_of_logits[0] == 1 and part_of_logits[1] < logits[1]


def test_recordings_are_gone_before_the_group_that_they_hold_calls_of(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    recorder = Recorder()
    runner = load(tmp_path, None, NoFollowers(), recorder)
    runner.warm_up(MAX_ROWS)
    assert len(recorder.living) == 2 + 2  # of steps, and of the choice of tokens, on one rank
    runner.close()
    gc.collect()
    assert len(recorder.living) == 2


@pytest.mark.parametrize("is_recordable", [False, True])
def test_steps_of_ranks_are_launched_before_tokens_are_read(
    is_recordable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path)
    monkeypatch.setattr(ProcessGroup, "is_recordable", is_recordable)
    prompts = [(5, 9, 23, 9), tuple(range(40, 60))]
    sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=3, frequency_penalty=0.5)

    found, _ = on_two_ranks(
        tmp_path, lambda runner: generate(runner, prompts, sampling, overlapped=True)
    )
    alone = load(tmp_path, None, NoFollowers(), Recorder())
    assert found == generate(alone, prompts, sampling)
