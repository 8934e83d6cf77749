"""What a hand-off must not change: tokens through prefill, wire and decode are those of one engine.

Router, workers and gRPC are the real ones, in one process, with the real transports.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pipeline import MakeTransports, Pipeline, outcome, pipeline
from tiny_models import FAMILIES, VOCAB_SIZE

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import SamplingParams
from pagewire.engine.load import load_engine
from pagewire.kv_transfer.local import LocalHub, LocalTransport
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import FinishReason

PROMPT_LENGTHS = (1, 63, 64, 65, 200, 1000)

ModelPath = Callable[[str], Path]


def prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    random_source = random.Random(seed)
    return [[random_source.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def tcp(incarnation: bytes, handler: "object") -> "list[TcpTransport]":
    return [TcpTransport(incarnation, handler, host="127.0.0.1")]


@pytest.mark.parametrize("family", FAMILIES)
def test_disaggregated_equals_aggregated(family: str, model_path: ModelPath) -> None:
    path = model_path(family)
    inputs = prompts(1, PROMPT_LENGTHS)
    runner = load_engine(path, dtype="float32", num_pages=64, num_threads=1)
    expected = generate(runner, inputs, SamplingParams(max_tokens=8))

    async def run() -> list[list[int]]:
        async with pipeline(path, tcp) as cluster:
            sampling = pb.SamplingParams(max_tokens=8, top_p=1.0)
            results = await asyncio.gather(
                *(cluster.generate(prompt, sampling) for prompt in inputs)
            )
            await cluster.until_idle()
        assert {reason for _, reason in results} == {FinishReason.LENGTH}
        return [tokens for tokens, _ in results]

    assert asyncio.run(run()) == expected
