"""What clients ask for, and when."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from pagewire.engine.sampling_params import SamplingParams
from pagewire.proto.choices import PageDemand
from pagewire.sim.kv_memory import LAYOUT
from pagewire.sim.model import VOCAB_SIZE, reference_tokens
from pagewire.sim.scenario import Scenario

_EARLY_STOP = 0.3  # probability that a request stops at one of its own tokens
_PATIENCE_S = 1.5  # a client that hangs up does so within this time


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One client with its request."""

    time: float
    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    expected: list[list[int]]  # the tokens that it must get, by choice
    hangs_up_after: float | None  # seconds from its arrival
    stops_after: float | None  # the same, when it has enough of its last choice


def random_workload(scenario: Scenario, random: Random, start: float) -> Iterator[Arrival]:
    """The requests of a scenario, from `start` on."""
    conversations: list[tuple[int, ...]] = []  # prompts with their answers
    for index in range(scenario.num_requests):
        prompt = _random_prompt(scenario, random, conversations)
        sampling = SamplingParams(max_tokens=random.randint(1, scenario.max_output_tokens))
        if random.random() < _EARLY_STOP:
            stop = random.choice(reference_tokens(prompt, sampling))
            sampling = replace(sampling, stop_token_ids=frozenset({stop}))
        expected = [
            reference_tokens(prompt, sampling.for_choice(choice))
            for choice in range(_num_choices(scenario, random, prompt, sampling))
        ]
        conversations.append((*prompt, *expected[0]))
        hangs_up = random.random() < scenario.cancel_probability
        stops = len(expected) > 1 and random.random() < scenario.stop_probability
        yield Arrival(
            time=start + random.uniform(0.0, scenario.arrival_s),
            request_id=f"request-{index}",
            prompt=prompt,
            sampling=sampling,
            expected=expected,
            hangs_up_after=random.uniform(0.0, _PATIENCE_S) if hangs_up else None,
            stops_after=random.uniform(0.0, _PATIENCE_S) if stops else None,
        )


def _num_choices(
    scenario: Scenario, random: Random, prompt: tuple[int, ...], sampling: SamplingParams
) -> int:
    """Mostly one; never more than a decode worker can hold."""
    n = random.choice((1, 1, random.randint(1, scenario.max_choices)))
    demand = PageDemand(num_prompt_tokens=len(prompt), max_tokens=sampling.max_tokens, n=n)
    while demand.num_pages(LAYOUT.page_size) > scenario.decode_pages:
        demand = replace(demand, n=demand.n - 1)
    return demand.n


def _random_prompt(
    scenario: Scenario, random: Random, conversations: list[tuple[int, ...]]
) -> tuple[int, ...]:
    """New from its first token on, or the continuation of what was said before."""
    num_tokens = random.randint(1, scenario.max_prompt_tokens)
    shared: tuple[int, ...] = ()
    if conversations and random.random() < scenario.shared_prefix_probability:
        earlier = random.choice(conversations)
        shared = earlier[: random.randint(0, min(num_tokens, len(earlier)))]
    new = (random.randrange(VOCAB_SIZE) for _ in range(num_tokens - len(shared)))
    return (*shared, *new)
