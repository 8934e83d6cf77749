"""What clients ask for, and when."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from pagewire.engine.sampling_params import SamplingParams
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
    expected: list[int]  # the tokens that it must get
    hangs_up_after: float | None  # seconds from its arrival


def random_workload(scenario: Scenario, random: Random, start: float) -> Iterator[Arrival]:
    """The requests of a scenario, from `start` on."""
    conversations: list[tuple[int, ...]] = []  # prompts with their answers
    for index in range(scenario.num_requests):
        prompt = _random_prompt(scenario, random, conversations)
        sampling = SamplingParams(max_tokens=random.randint(1, scenario.max_output_tokens))
        expected = reference_tokens(prompt, sampling)
        if random.random() < _EARLY_STOP:
            stop = random.choice(expected)
            sampling = SamplingParams(
                max_tokens=sampling.max_tokens, stop_token_ids=frozenset({stop})
            )
            expected = expected[: expected.index(stop) + 1]
        conversations.append((*prompt, *expected))
        hangs_up = random.random() < scenario.cancel_probability
        yield Arrival(
            time=start + random.uniform(0.0, scenario.arrival_s),
            request_id=f"request-{index}",
            prompt=prompt,
            sampling=sampling,
            expected=expected,
            hangs_up_after=random.uniform(0.0, _PATIENCE_S) if hangs_up else None,
        )


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
