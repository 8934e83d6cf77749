"""Prompts for a pipeline of workers, and the tokens that one engine says to them."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from pipeline import Pipeline
from tiny_models import VOCAB_SIZE

from pagewire.engine.aggregated import generate
from pagewire.engine.load import load_engine
from pagewire.engine.sampling_params import SamplingParams
from pagewire.proto import worker_pb2 as pb

NUM_TOKENS = 6
SAMPLING = pb.SamplingParams(max_tokens=NUM_TOKENS, top_p=1.0)


def prompts(*lengths: int) -> list[list[int]]:
    source = random.Random(2)
    return [[source.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def expected(path: Path, inputs: Sequence[Sequence[int]]) -> list[list[int]]:
    runner = load_engine(path, dtype="float32", num_pages=64, num_threads=1)
    return generate(runner, inputs, SamplingParams(max_tokens=NUM_TOKENS))


async def tokens_of(cluster: Pipeline, inputs: Sequence[Sequence[int]]) -> list[list[int]]:
    results = await asyncio.gather(*(cluster.generate(prompt, SAMPLING) for prompt in inputs))
    await cluster.until_idle()
    return [tokens for tokens, _ in results]
