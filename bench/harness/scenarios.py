"""What every engine is put through in a round, and what is kept of it.

A round asks all engines the same, one engine after the other, so that what the machine does beside
the benchmark hits them alike. Prompts are new ones in every round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.load import Prompt, closed_loop, steady_prefills
from harness.prompts import PromptSource
from harness.streams import Endpoint, StreamTimes
from peers.peer import Traits

MIN_REQUESTS = 4  # of a load, so that one stream gives more than one TTFT
MAX_ARRIVING = 100  # more long prompts than fit into the time of one round


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    streams: tuple[int, ...] = (1, 8, 32)
    requests_per_stream: int = 1  # with 1, all prompts arrive together and nothing follows them
    rounds: int = 5
    prompt_tokens: int = 128
    max_tokens: int = 64
    long_prompt_tokens: int = 1000
    num_long_prompts: int = 2  # a round
    interfered_streams: int = 8  # that decode while long prompts arrive
    interfered_tokens: int = 128
    prefill_interval_s: float = 2.0


QUICK = Plan(
    streams=(1, 8),
    rounds=1,
    max_tokens=16,
    num_long_prompts=1,
    interfered_tokens=16,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundInput:
    """The prompts of one round, the same for every engine."""

    load: dict[int, list[list[int]]]  # by number of streams
    long: list[list[int]]
    alone: list[list[int]]
    beside: list[list[int]]
    arriving: list[list[int]]  # while `beside` decodes


@dataclass(slots=True, kw_only=True)
class Record:
    """Everything that was measured of one engine, round after round."""

    load: dict[int, list[list[StreamTimes]]] = field(default_factory=dict)
    misses: list[StreamTimes] = field(default_factory=list)
    hits: list[StreamTimes] = field(default_factory=list)  # the same prompts again, in order
    alone: list[StreamTimes] = field(default_factory=list)
    beside: list[StreamTimes] = field(default_factory=list)
    arrived: list[StreamTimes] = field(default_factory=list)


def make_round(plan: Plan, source: PromptSource) -> RoundInput:
    """Prompts that nobody has seen."""
    return RoundInput(
        load={
            count: source.take(
                max(count * plan.requests_per_stream, MIN_REQUESTS), plan.prompt_tokens
            )
            for count in plan.streams
        },
        long=source.take(plan.num_long_prompts, plan.long_prompt_tokens),
        alone=source.take(plan.interfered_streams, plan.prompt_tokens),
        beside=source.take(plan.interfered_streams, plan.prompt_tokens),
        arriving=source.take(MAX_ARRIVING, plan.long_prompt_tokens),
    )


async def run_round(
    endpoint: Endpoint, traits: Traits, plan: Plan, prompts: RoundInput, record: Record
) -> None:
    """Everything that this engine can do. Raises StreamError."""
    for count in loads_of(traits, plan):
        streams = await closed_loop(
            endpoint, prompts.load[count], num_streams=count, max_tokens=plan.max_tokens
        )
        record.load.setdefault(count, []).append(streams)
    if traits.reports_tokens:
        await _prefill(endpoint, prompts.long, record)
    if traits.batches_continuously:
        await _interference(endpoint, plan, prompts, record)


def loads_of(traits: Traits, plan: Plan) -> list[int]:
    """The numbers of streams that the engine can serve."""
    return [count for count in plan.streams if count <= (traits.max_streams or count)]


async def _prefill(endpoint: Endpoint, prompts: Sequence[Prompt], record: Record) -> None:
    """Each prompt twice, with nothing beside it."""
    for prompt in prompts:
        record.misses.append(await endpoint.stream(prompt, 1))
        record.hits.append(await endpoint.stream(prompt, 1))


async def _interference(
    endpoint: Endpoint, plan: Plan, prompts: RoundInput, record: Record
) -> None:
    """Streams that decode undisturbed, and the like with a steady stream of long prompts."""

    async def decode(these: Sequence[Prompt]) -> list[StreamTimes]:
        return await closed_loop(
            endpoint,
            these,
            num_streams=plan.interfered_streams,
            max_tokens=plan.interfered_tokens,
        )

    record.alone += await decode(prompts.alone)
    async with steady_prefills(
        endpoint, prompts.arriving, interval_s=plan.prefill_interval_s
    ) as arrived:
        record.beside += await decode(prompts.beside)
    record.arrived += arrived
