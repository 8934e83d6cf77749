"""Prefill and decode workers with unlike KV caches: what tokens come of them, and what travels."""

import asyncio
import random
from collections.abc import Mapping
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import pipeline, tcp
from tiny_models import VOCAB_SIZE
from torch import Tensor

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.kv_pool import quantize_vectors
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.config import Role

Fields = Mapping[str, Any]

CHUNK = 128
MAX_TOKENS = 8
GREEDY = pb.SamplingParams(max_tokens=MAX_TOKENS, top_p=1.0)
INT8: Fields = {"kv_cache_dtype": KVCacheDtype.INT8}


def prompts(*lengths: int) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def run(
    model: Path, prefill: Fields, decode: Fields, inputs: list[list[int]]
) -> tuple[list[list[int]], list[int]]:
    """Tokens of each prompt and the bytes that its hand-off took, one prompt after another."""

    async def serve() -> tuple[list[list[int]], list[int]]:
        by_role = {Role.PREFILL: prefill, Role.DECODE: decode}
        async with pipeline(
            model, tcp, max_batch_tokens=CHUNK, slot_bytes=1 << 17, by_role=by_role
        ) as cluster:
            tokens, received = [], [0]
            for prompt in inputs:
                tokens.append((await cluster.generate(prompt, GREEDY))[0])
                [totals] = cluster.workers["decode-0"].worker.state().transfers
                received.append(totals.bytes_received)
            await cluster.until_idle()
            return tokens, [end - start for start, end in pairwise(received)]

    return asyncio.run(serve())


def load(model: Path, fields: Fields) -> ModelRunner:
    return load_engine(model, **{"dtype": "float32", "num_pages": 64, "num_threads": 1, **fields})


@pytest.mark.parametrize(("mine", "theirs"), [(16, 64), (64, 16), (128, 32), (32, 128)])
def test_page_sizes_do_not_change_a_token(mine: int, theirs: int, llama: Path) -> None:
    inputs = prompts(1, 63, 64, 65, 130, 600)
    tokens, received = run(llama, {"page_size": mine}, {"page_size": theirs}, inputs)
    layout = load(llama, {"page_size": mine}).layout
    assert received == [layout.num_pages(len(prompt)) * layout.page_bytes for prompt in inputs]
    runner = load(llama, {"page_size": 16, "num_pages": 128})
    assert tokens == generate(runner, inputs, SamplingParams(max_tokens=MAX_TOKENS))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({}, INT8),
        (INT8, {}),
        ({}, {"dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "page_size": 16}, INT8),
        ({"page_size": 128}, {**INT8, "page_size": 32}),
    ],
    ids=["float32-int8", "int8-float32", "float32-bfloat16", "bfloat16/16-int8", "128-int8/32"],
)
def test_decoding_goes_on_from_the_kv_of_the_prompt_in_the_dtype_of_the_receiver(
    prefill: Fields, decode: Fields, llama: Path
) -> None:
    inputs = prompts(1, 65, 300)
    tokens, _ = run(llama, prefill, decode, inputs)
    first, second = load(llama, prefill), load(llama, decode)
    assert tokens == [converted_by_hand(first, second, prompt) for prompt in inputs]


@pytest.mark.parametrize(("mine", "theirs"), [(16, 64), (64, 16), (128, 32)])
def test_of_a_prompt_that_the_receiver_had_the_last_page_alone_travels(
    mine: int, theirs: int, llama: Path
) -> None:
    [prompt] = prompts(200)
    tokens, received = run(llama, {"page_size": mine}, {"page_size": theirs}, [prompt, prompt])
    layout = load(llama, {"page_size": mine}).layout
    assert received[1] == layout.page_bytes
    assert tokens[0] == tokens[1]


def converted_by_hand(prefill: ModelRunner, decode: ModelRunner, prompt: list[int]) -> list[int]:
    """What two engines generate when the KV of each token is carried over by itself."""
    output: list[int] = []
    for start in range(0, len(prompt), CHUNK):
        output = step(prefill, prompt[start : start + CHUNK], start)
    for position in range(len(prompt)):
        store(decode, position, read(prefill, position))
    for position in count(len(prompt)):
        if len(output) == MAX_TOKENS:
            break
        output += step(decode, output[-1:], position)
    return output


def step(runner: ModelRunner, token_ids: list[int], start: int) -> list[int]:
    row = BatchRow(
        request_id="",
        token_ids=tuple(token_ids),
        start=start,
        page_table=range(runner.num_pages),
        sampling=SamplingParams(max_tokens=MAX_TOKENS),
    )
    return list(runner.execute(Batch(rows=(row,))).tokens[0])


def read(runner: ModelRunner, position: int) -> Tensor:
    """float32 [num_layers, num_kv_heads, 2 (K, V), head_dim]."""
    page, slot = divmod(position, runner.layout.page_size)
    pages = runner.kv_cache.pages
    values = pages.values[page, :, :, :, slot].float()
    return values if pages.scales is None else values * pages.scales[page, :, :, :, slot, None]


def store(runner: ModelRunner, position: int, vectors: Tensor) -> None:
    page, slot = divmod(position, runner.layout.page_size)
    pages = runner.kv_cache.pages
    if pages.scales is None:
        pages.values[page, :, :, :, slot] = vectors.to(pages.values.dtype)
        return
    pages.values[page, :, :, :, slot], pages.scales[page, :, :, :, slot] = quantize_vectors(vectors)


def test_the_oracle_is_the_engine_where_nothing_is_converted(llama: Path) -> None:
    [prompt] = prompts(65)
    runner = load(llama, {})
    expected = generate(runner, [prompt], SamplingParams(max_tokens=MAX_TOKENS), chunk_size=CHUNK)
    assert converted_by_hand(runner, load(llama, {}), prompt) == expected[0]
    assert torch.isfinite(read(runner, 64)).all()
