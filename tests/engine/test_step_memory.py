"""What a step allocates beside weights and KV: the length of its context must not show in it.

Counted is every allocation and release that torch reports to its profiler, also those inside of
operations.
"""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity
from transformers import PreTrainedModel

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import KernelError
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams

SHORT, LONG = 1024, 8192  # contexts; LONG is the whole of the model's
CHUNK = 128
PAGE_SIZE = 64


def load(make_model: Callable[..., PreTrainedModel], path: Path, **options: Any) -> ModelRunner:
    make_model("llama", max_position_embeddings=LONG)
    runner = load_engine(
        path, dtype="float32", page_size=PAGE_SIZE, num_pages=LONG // PAGE_SIZE, **options
    )
    runner.kv_cache.pool.zero_()
    return runner


def peak_bytes(runner: ModelRunner, num_tokens: int, context_len: int) -> int:
    """The most that a step over the last tokens of a context holds at any moment."""
    row = BatchRow(
        request_id="r1",
        token_ids=[5] * num_tokens,
        start=context_len - num_tokens,
        page_table=range(context_len // PAGE_SIZE),
        sampling=SamplingParams(),
    )
    runner.forward(Batch(rows=(row,)))  # what is made once is not counted
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        runner.forward(Batch(rows=(row,)))
    results: Any = profile.profiler and profile.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: int(event.start_ns()))
    return max(accumulate(int(event.nbytes()) for event in changes))


@pytest.mark.parametrize("num_tokens", [CHUNK, 1])
@pytest.mark.parametrize("kv_cache_dtype", KVCacheDtype)
def test_a_step_in_cpp_takes_no_more_for_a_longer_context(
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    kv_cache_dtype: KVCacheDtype,
    num_tokens: int,
) -> None:
    try:
        runner = load(make_model, tmp_path, kernels="native", kv_cache_dtype=kv_cache_dtype)
    except KernelError as error:
        pytest.skip(str(error))
    short, long = (peak_bytes(runner, num_tokens, context) for context in (SHORT, LONG))
    # For decode a row of the page table and a partial sum for each 512 positions.
    assert long - short <= (16 << 10 if num_tokens == 1 else 0)


@pytest.mark.parametrize("kv_cache_dtype", KVCacheDtype)
def test_a_chunk_in_torch_takes_a_copy_of_one_layers_kv_and_a_mask(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, kv_cache_dtype: KVCacheDtype
) -> None:
    runner = load(make_model, tmp_path, kernels="torch", kv_cache_dtype=kv_cache_dtype)
    short, long = (peak_bytes(runner, CHUNK, context) for context in (SHORT, LONG))
    config = runner.model.config
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * 4
    mask_bytes = CHUNK * (1 + 4)  # as booleans, and as the floats that torch makes of them
    assert long - short <= 2 * (LONG - SHORT) * (kv_bytes + mask_bytes)
