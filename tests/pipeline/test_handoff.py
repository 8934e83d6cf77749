"""What a hand-off must not change: tokens through prefill, wire and decode are those of one engine.

Router, workers and gRPC are the real ones, in one process, with a tiny random model.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from noisy_models import save_noisy
from pipeline import Pipeline, pipeline, request, tcp
from tiny_models import FAMILIES, VOCAB_SIZE, SavedModel, greedy_tokens

from pagewire.decode_worker.core import DecodeCore
from pagewire.engine.aggregated import generate
from pagewire.engine.batch import StepResult
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import load_engine
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kv_transfer.local import LocalHub, LocalTransport
from pagewire.kv_transfer.select import create_transports, probe
from pagewire.kv_transfer.tcp import TcpConnection, TcpTransport
from pagewire.kv_transfer.transport import Handler, Transport, TransportError
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import FinishReason, TokenUpdate
from pagewire.worker.config import Role
from pagewire.worker.effects import Effect

PROMPT_LENGTHS = (1, 63, 64, 65, 200, 1000)

Result = tuple[list[int], FinishReason]


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int, stop: Sequence[int] = ()) -> pb.SamplingParams:
    return pb.SamplingParams(max_tokens=max_tokens, top_p=1.0, stop_token_ids=stop)


def aggregated(path: Path, inputs: list[list[int]], sampling: SamplingParams) -> list[list[int]]:
    runner = load_engine(path, dtype="float32", num_pages=512, num_threads=1)
    return generate(runner, inputs, sampling)


async def generate_all(
    cluster: Pipeline, inputs: list[list[int]], sampling: pb.SamplingParams
) -> list[Result]:
    """All prompts at once; afterwards every page must be free."""
    results = await asyncio.gather(*(cluster.generate(prompt, sampling) for prompt in inputs))
    await cluster.until_idle()
    return list(results)


@pytest.mark.parametrize("family", FAMILIES)
def test_disaggregated_equals_aggregated_equals_transformers(
    family: str, saved_model: Callable[[str], SavedModel]
) -> None:
    model = saved_model(family)
    inputs = prompts(PROMPT_LENGTHS)

    async def run() -> list[Result]:
        async with pipeline(model.path, tcp) as cluster:
            return await generate_all(cluster, inputs, greedy(8))

    results = asyncio.run(run())
    assert {reason for _, reason in results} == {FinishReason.LENGTH}
    tokens = [tokens for tokens, _ in results]
    assert tokens == aggregated(model.path, inputs, SamplingParams(max_tokens=8))
    assert tokens == [greedy_tokens(model.reference, prompt, 8) for prompt in inputs]


def test_steps_that_overlap_give_the_same_tokens(llama: Path) -> None:
    """Requests of different lengths, some of which end at a token that only then is known."""
    inputs = prompts((1, 40, 65, 130))
    expected = aggregated(llama, inputs, SamplingParams(max_tokens=20))
    stops = {expected[0][6], expected[2][11]}
    sampling = SamplingParams(max_tokens=20, stop_token_ids=frozenset(stops))
    by_role = {Role.DECODE: {"overlap_steps": True}}

    async def run() -> list[Result]:
        async with pipeline(llama, tcp, by_role=by_role) as cluster:
            return await generate_all(cluster, inputs, greedy(20, sorted(stops)))

    results = asyncio.run(run())
    assert [tokens for tokens, _ in results] == aggregated(llama, inputs, sampling)


@pytest.mark.parametrize("stream_layers", [True, False])
def test_the_last_chunk_is_reported_layer_by_layer(
    llama: Path, monkeypatch: pytest.MonkeyPatch, stream_layers: bool
) -> None:
    """Once a prompt, whatever the number of its chunks, and the tokens are the same."""
    reported: list[int] = []

    def listen(core: PrefillCore, num_layers: int, now: float) -> list[Effect]:
        reported.append(num_layers)
        return on_layers_done(core, num_layers, now)

    on_layers_done = PrefillCore.on_layers_done
    monkeypatch.setattr(PrefillCore, "on_layers_done", listen)
    inputs = prompts((65, 300))

    async def run() -> list[Result]:
        by_role = {Role.PREFILL: {"stream_layers": stream_layers}}
        async with pipeline(llama, tcp, by_role=by_role) as cluster:
            return [
                result
                for prompt in inputs
                for result in await generate_all(cluster, [prompt], greedy(6))
            ]

    tokens = [tokens for tokens, _ in asyncio.run(run())]
    assert tokens == aggregated(llama, inputs, SamplingParams(max_tokens=6))
    assert reported == ([1, 2, 3] * len(inputs) if stream_layers else [])


@pytest.mark.parametrize("kind", ["local", "shm", "gloo", "ucx"])
def test_other_transports_carry_the_same_tokens(kind: str, llama: Path) -> None:
    if kind == "ucx" and not probe().usable:
        pytest.skip(probe().explanation)
    hub = LocalHub()
    inputs = prompts((1, 65, 300))

    def make(incarnation: bytes, handler: Handler) -> list[Transport]:
        if kind == "local":
            return [LocalTransport(hub=hub, incarnation=incarnation, handler=handler)]
        return list(create_transports(kind, incarnation, handler, "127.0.0.1").transports)

    async def run() -> list[Result]:
        async with pipeline(llama, make) as cluster:
            results = await generate_all(cluster, inputs, greedy(6))
            [totals] = cluster.workers["decode-0"].worker.state().transfers
            assert (totals.kind, totals.failures) == (kind, 0)
            assert totals.bytes_received > 0
            return results

    tokens = [tokens for tokens, _ in asyncio.run(run())]
    assert tokens == aggregated(llama, inputs, SamplingParams(max_tokens=6))


def test_the_next_transport_is_used_where_the_best_one_does_not_connect(llama: Path) -> None:
    class Unreachable(TcpTransport):
        kind = "shm"  # the best that both ends have

        async def connect(self, peer: bytes, address: bytes) -> TcpConnection:
            raise TransportError("no way")

    def make(incarnation: bytes, handler: Handler) -> list[Transport]:
        return [
            Unreachable(incarnation=incarnation, handler=handler, host="127.0.0.1"),
            *tcp(incarnation, handler),
        ]

    async def run() -> list[Result]:
        async with pipeline(llama, make) as cluster:
            results = await generate_all(cluster, prompts((65,)), greedy(2))
            totals = cluster.workers["decode-0"].worker.state().transfers
            received = {item.kind: item.bytes_received for item in totals}
            assert received["shm"] == 0 < received["tcp"]
            return results

    assert [reason for _, reason in asyncio.run(run())] == [FinishReason.LENGTH]


def test_an_int8_cache_is_handed_over_as_it_is(llama: Path) -> None:
    chunk, inputs = 128, prompts((1, 64, 65, 300))

    runner = load_engine(
        llama, dtype="float32", kv_cache_dtype=KVCacheDtype.INT8, num_pages=16, num_threads=1
    )

    async def run() -> list[list[int]]:
        async with pipeline(
            llama, tcp, max_batch_tokens=chunk, kv_cache_dtype=KVCacheDtype.INT8
        ) as cluster:
            # One after another: in larger batches other roundings of floats would reach the 8 bits.
            outputs = [(await cluster.generate(prompt, greedy(8)))[0] for prompt in inputs]
            [totals] = cluster.workers["decode-0"].worker.state().transfers
            num_pages = sum(runner.layout.num_pages(len(prompt)) for prompt in inputs)
            assert totals.bytes_received == num_pages * runner.layout.page_bytes
            return outputs

    sampling = SamplingParams(max_tokens=8)
    expected = [generate(runner, [prompt], sampling, chunk_size=chunk)[0] for prompt in inputs]
    assert asyncio.run(run()) == expected


def test_many_streams_over_two_pairs_all_finish_right(llama: Path) -> None:
    inputs = prompts([1 + 23 * index for index in range(32)])

    async def run() -> list[Result]:
        async with pipeline(llama, tcp, prefill=2, decode=2) as cluster:
            results = await generate_all(cluster, inputs, greedy(12))
            assert all(item.num_generated() for item in cluster.workers.values())
            return results

    results = asyncio.run(run())
    expected = aggregated(llama, inputs, SamplingParams(max_tokens=12))
    assert [tokens for tokens, _ in results] == expected


def test_seeded_sampling_is_the_same_wherever_it_runs(llama: Path) -> None:
    inputs = prompts((5, 70))
    drawn = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95, top_k=40, seed=11)
    asked = pb.SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95, top_k=40, seed=11)

    async def run() -> list[Result]:
        async with pipeline(llama, tcp) as cluster:
            return await generate_all(cluster, inputs, asked)

    tokens = [tokens for tokens, _ in asyncio.run(run())]
    assert tokens == aggregated(llama, inputs, drawn)


def test_penalties_count_the_prompt_and_token_0_on_the_decode_worker(llama: Path) -> None:
    inputs = prompts((5, 70))
    params = SamplingParams(
        max_tokens=16,
        min_tokens=9,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias=((7, 4.0),),
    )
    asked = pb.SamplingParams(
        max_tokens=16,
        top_p=1.0,
        min_tokens=9,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias={7: 4.0},
    )

    async def run() -> list[Result]:
        async with pipeline(llama, tcp) as cluster:
            return await generate_all(cluster, inputs, asked)

    tokens = [tokens for tokens, _ in asyncio.run(run())]
    assert tokens == aggregated(llama, inputs, params)
    assert tokens != aggregated(llama, inputs, SamplingParams(max_tokens=16))


def test_every_token_has_its_logprobs_wherever_it_was_sampled(llama: Path) -> None:
    [prompt] = prompts((30,))
    asked = pb.SamplingParams(max_tokens=6, top_p=1.0, num_logprobs=2)

    async def run() -> list[TokenUpdate]:
        async with pipeline(llama, tcp) as cluster:
            return [update async for update in cluster.control.submit(request(prompt, asked))]

    updates = asyncio.run(run())
    tokens = [token for update in updates for token in update.token_ids]
    logprobs = [each for update in updates for each in update.logprobs]
    assert len(tokens) == len(logprobs) == 6
    for token, values in zip(tokens, logprobs, strict=True):
        assert values.top_token_ids[0] == token  # greedy
        assert values.top_logprobs[0] == values.logprob
        assert 0 > values.top_logprobs[0] >= values.top_logprobs[1]


def test_a_request_that_ends_at_token_0_makes_no_hand_off(llama: Path) -> None:
    [prompt] = prompts((30,))
    [[first]] = aggregated(llama, [prompt], SamplingParams(max_tokens=1))

    async def run() -> tuple[Result, Result, int]:
        async with pipeline(llama, tcp) as cluster:
            by_length = await cluster.generate(prompt, greedy(1))
            by_stop = await cluster.generate(prompt, greedy(5, stop=[first]))
            await cluster.until_idle()
            return by_length, by_stop, cluster.workers["decode-0"].num_generated()

    by_length, by_stop, num_decoded = asyncio.run(run())
    assert by_length == ([first], FinishReason.LENGTH)
    assert by_stop == ([first], FinishReason.STOP)
    assert num_decoded == 0


def test_a_stop_token_ends_a_stream_on_the_decode_worker(llama: Path) -> None:
    [prompt] = prompts((30,))
    [tokens] = aggregated(llama, [prompt], SamplingParams(max_tokens=12))
    end = next(index for index in range(1, 12) if tokens[index] not in tokens[:index])

    async def run() -> Result:
        async with pipeline(llama, tcp) as cluster:
            return (await generate_all(cluster, [prompt], greedy(12, stop=[tokens[end]])))[0]

    assert asyncio.run(run()) == (tokens[: end + 1], FinishReason.STOP)


def test_streams_wait_their_turn_when_the_pool_is_small(llama: Path) -> None:
    """Six requests of three pages each pass through pools that hold two of them."""
    inputs = prompts([150] * 6)

    async def run() -> list[Result]:
        async with pipeline(llama, tcp, num_pages=7, num_slots=1) as cluster:
            return await generate_all(cluster, inputs, greedy(10))

    tokens = [tokens for tokens, _ in asyncio.run(run())]
    assert tokens == aggregated(llama, inputs, SamplingParams(max_tokens=10))


def test_a_repeated_prompt_gives_the_same_tokens_from_cached_pages(llama: Path) -> None:
    (prompt,) = prompts([1000])
    sampled = pb.SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, seed=7)

    async def run(prefix_cache: bool) -> tuple[list[Result], int]:
        async with pipeline(llama, tcp, prefix_cache=prefix_cache) as cluster:
            results = []
            for sampling in (greedy(8), greedy(8), sampled, sampled):
                results += await generate_all(cluster, [prompt], sampling)
            return results, cluster.workers["prefill-0"].worker.state().prompt_tokens

    cached, num_computed = asyncio.run(run(True))
    uncached, num_without = asyncio.run(run(False))
    assert cached == uncached
    assert cached[0] == cached[1] and cached[2] == cached[3]
    assert (num_without, num_computed) == (4 * 1000, 1000 + 3 * (1000 % 64))


def test_speculation_gives_the_same_tokens_in_fewer_steps(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pool with no page to spare: drafts never reach behind the reservation."""
    (prompt,) = prompts([20])
    asked = pb.SamplingParams(
        max_tokens=107, temperature=0.01, top_p=1.0, seed=3
    )  # 127 tokens: 2 pages
    steps: list[StepResult] = []

    def counted(core: DecodeCore, result: StepResult, now: float) -> list[Effect]:
        steps.append(result)
        return on_batch_done(core, result, now)

    on_batch_done = DecodeCore.on_batch_done
    monkeypatch.setattr(DecodeCore, "on_batch_done", counted)

    async def run(max_draft_tokens: int) -> list[Result]:
        steps.clear()
        async with pipeline(llama, tcp, num_pages=2, max_draft_tokens=max_draft_tokens) as cluster:
            return await generate_all(cluster, [prompt], asked)

    plain = asyncio.run(run(0))
    assert len(steps) == 106
    assert asyncio.run(run(16)) == plain
    assert len(steps) < 106


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_draft_model_gives_the_same_tokens_in_fewer_steps(
    temperature: float, saved_model: Callable[[str], SavedModel], tmp_path: Path
) -> None:
    """Streams that come and go, in a pool that some of them wait for."""
    model = saved_model("llama")
    draft = save_noisy(model.reference, tmp_path, noise=0.01)
    inputs = prompts((1, 15, 64, 130, 30, 200))
    asked = pb.SamplingParams(max_tokens=60, temperature=temperature, top_p=1.0, seed=3)

    async def run(draft_model: Path | None) -> tuple[list[Result], pb.WorkerState]:
        num_drafts = 16 if draft_model else 0
        async with pipeline(
            model.path, tcp, num_pages=9, max_draft_tokens=num_drafts, draft_model=draft_model
        ) as cluster:
            results = await generate_all(cluster, inputs, asked)
            return results, cluster.workers["decode-0"].worker.state()

    plain, without = asyncio.run(run(None))
    drafted, state = asyncio.run(run(draft))
    assert drafted == plain
    assert without.drafted_tokens == without.accepted_tokens == 0
    assert state.drafted_tokens >= state.accepted_tokens > state.generated_tokens / 4
