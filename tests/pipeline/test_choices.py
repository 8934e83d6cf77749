"""Several choices of one request: each is what a request for one would get, from one prefill.

Router, workers and gRPC are the real ones, in one process, with a tiny random model.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from noisy_models import save_noisy
from pipeline import Pipeline, pipeline, request, tcp
from tiny_models import VOCAB_SIZE, SavedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.load import load_engine
from pagewire.engine.sampling_params import SamplingParams
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import PageDemand
from pagewire.router.request import FinishReason

PAGE_SIZE = 64
SEED = 40

Choice = tuple[list[int], FinishReason]


def make_prompt(length: int) -> list[int]:
    source = random.Random(length)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def sampled(max_tokens: int, stop: tuple[int, ...] = ()) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=max_tokens, temperature=1.0, top_p=0.95, seed=SEED, stop_token_ids=stop
    )


def alone(path: Path, prompt: list[int], params: pb.SamplingParams, n: int) -> list[list[int]]:
    """What requests for one choice would get with the seeds of the choices."""
    runner = load_engine(path, dtype="float32", num_pages=64, num_threads=1)
    return [
        generate(
            runner,
            [prompt],
            SamplingParams(
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                seed=params.seed + choice,
                stop_token_ids=frozenset(params.stop_token_ids),
            ),
        )[0]
        for choice in range(n)
    ]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_each_choice_is_what_a_request_with_its_seed_gets(length: int, llama: Path) -> None:
    """In pools with not a page more than a prompt that is shared needs."""
    prompt, params, n = make_prompt(length), sampled(9), 4
    demand = PageDemand(num_prompt_tokens=length, max_tokens=9, n=n)

    async def run() -> tuple[list[Choice], int]:
        async with pipeline(llama, tcp, num_pages=demand.num_pages(PAGE_SIZE)) as cluster:
            choices = await cluster.generate_choices(prompt, params, n)
            await cluster.until_idle()
            return choices, cluster.workers["prefill-0"].worker.state().prompt_tokens

    choices, num_computed = asyncio.run(run())
    tokens = [tokens for tokens, _ in choices]
    assert tokens == alone(llama, prompt, params, n)
    assert len({tuple(each) for each in tokens}) > 1
    assert num_computed == length


@pytest.mark.parametrize("max_draft_tokens", [0, 16])
def test_greedy_choices_are_equal(llama: Path, max_draft_tokens: int) -> None:
    params = pb.SamplingParams(max_tokens=70, top_p=1.0)
    prompt = make_prompt(100)

    async def run() -> list[Choice]:
        async with pipeline(llama, tcp, max_draft_tokens=max_draft_tokens) as cluster:
            choices = await cluster.generate_choices(prompt, params, 3)
            await cluster.until_idle()
            return choices

    [expected] = alone(llama, prompt, params, 1)
    assert asyncio.run(run()) == [(expected, FinishReason.LENGTH)] * 3


@pytest.mark.parametrize("length", [1, 64, 65, 100])
def test_choices_beside_a_draft_model_are_the_same(
    length: int, saved_model: Callable[[str], SavedModel], tmp_path: Path
) -> None:
    """Both models write the pages of each choice, in pools with not a page more than needed."""
    model = saved_model("llama")
    draft = save_noisy(model.reference, tmp_path, noise=0.001)
    prompt, params, n = make_prompt(length), sampled(40), 3
    demand = PageDemand(num_prompt_tokens=length, max_tokens=40, n=n)

    async def run() -> tuple[list[Choice], pb.WorkerState]:
        async with pipeline(
            model.path,
            tcp,
            num_pages=demand.num_pages(PAGE_SIZE),
            max_draft_tokens=16,
            draft_model=draft,
        ) as cluster:
            choices = await cluster.generate_choices(prompt, params, n)
            await cluster.until_idle()
            return choices, cluster.workers["decode-0"].worker.state()

    choices, state = asyncio.run(run())
    assert [tokens for tokens, _ in choices] == alone(model.path, prompt, params, n)
    assert state.accepted_tokens > 0


def test_what_ends_at_token_0_is_not_handed_off(llama: Path) -> None:
    prompt, params = make_prompt(65), sampled(1)

    async def run() -> tuple[list[Choice], int]:
        async with pipeline(llama, tcp) as cluster:
            choices = await cluster.generate_choices(prompt, params, 4)
            await cluster.until_idle()
            return choices, cluster.workers["decode-0"].num_generated()

    choices, num_decoded = asyncio.run(run())
    assert [tokens for tokens, _ in choices] == alone(llama, prompt, params, 4)
    assert {reason for _, reason in choices} == {FinishReason.LENGTH}
    assert num_decoded == 0


def test_each_choice_stops_on_its_own(llama: Path) -> None:
    """One at token 0, one later on the decode worker, and others at their length."""
    prompt, n = make_prompt(90), 4
    free = alone(llama, prompt, sampled(12), n)
    stops = (free[1][0], free[2][3])
    params = sampled(12, stops)
    expected = alone(llama, prompt, params, n)
    assert len(expected[1]) == 1 and 1 < len(expected[2]) <= 4

    async def run() -> list[Choice]:
        async with pipeline(llama, tcp) as cluster:
            choices = await cluster.generate_choices(prompt, params, n)
            await cluster.until_idle()
            return choices

    for (tokens, reason), wanted in zip(asyncio.run(run()), expected, strict=True):
        assert tokens == wanted
        assert (reason is FinishReason.STOP) == (tokens[-1] in stops)


def test_each_choice_has_its_logprobs(llama: Path) -> None:
    prompt, params = make_prompt(64), sampled(6)
    params.num_logprobs = 2

    async def choice_logprobs(cluster: Pipeline, seed: int, n: int) -> list[list[float]]:
        asked = pb.SamplingParams()
        asked.CopyFrom(params)
        asked.seed = seed
        logprobs: list[list[float]] = [[] for _ in range(n)]
        async for update in cluster.control.submit(request(prompt, asked, n)):
            assert len(update.logprobs) == len(update.token_ids)
            logprobs[update.choice] += [each.logprob for each in update.logprobs]
        return logprobs

    async def run() -> tuple[list[list[float]], list[list[float]]]:
        async with pipeline(llama, tcp) as cluster:
            together = await choice_logprobs(cluster, SEED, 3)
            each = [(await choice_logprobs(cluster, SEED + i, 1))[0] for i in range(3)]
            return together, each

    together, each = asyncio.run(run())
    assert [len(logprobs) for logprobs in together] == [6, 6, 6]
    for mine, lone in zip(together, each, strict=True):
        assert mine == pytest.approx(lone, abs=1e-4)


def test_many_forks_at_once_pass_through_a_small_pool(llama: Path) -> None:
    prompts = [make_prompt(length) for length in (100, 120, 128, 129, 150)]
    params = sampled(12)

    async def run() -> list[list[Choice]]:
        async with pipeline(llama, tcp, num_pages=12, num_slots=2) as cluster:
            jobs = (cluster.generate_choices(prompt, params, 3) for prompt in prompts)
            results = await asyncio.gather(*jobs)
            await cluster.until_idle()
            return list(results)

    for prompt, choices in zip(prompts, asyncio.run(run()), strict=True):
        assert [tokens for tokens, _ in choices] == alone(llama, prompt, params, 3)


def test_a_client_that_leaves_frees_every_choice(llama: Path) -> None:
    async def run() -> None:
        async with pipeline(llama, tcp) as cluster:
            stream = cluster.control.submit(request(make_prompt(70), sampled(500), 4))
            num_updates = 0
            async for _ in stream:
                num_updates += 1
                if num_updates == 10:
                    break
            stream.cancel("the client is gone")
            await cluster.until_idle()

    asyncio.run(run())


def test_a_choice_that_is_stopped_leaves_the_others_alone(llama: Path) -> None:
    prompt, params = make_prompt(70), sampled(30)

    async def run() -> tuple[list[list[int]], int]:
        async with pipeline(llama, tcp) as cluster:
            stream = cluster.control.submit(request(prompt, params, 3))
            tokens: list[list[int]] = [[], [], []]
            async for update in stream:
                tokens[update.choice] += update.token_ids
                if update.choice == 0 and len(tokens[0]) == 5:
                    stream.stop_choice(0)
            await cluster.until_idle()
            return tokens, cluster.workers["decode-0"].num_generated()

    tokens, num_decoded = asyncio.run(run())
    expected = alone(llama, prompt, params, 3)
    assert tokens[1:] == expected[1:]
    assert tokens[0] == expected[0][: len(tokens[0])]
    assert num_decoded < 3 * 29
