"""A full decode worker serves the oldest requests first, whoever asks it when; in virtual time."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from pagewire.decode_worker.admission import Admission
from pagewire.decode_worker.handoffs import Handoffs
from pagewire.decode_worker.request import DecodeRequest
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kv_transfer.messages import Open
from pagewire.sim import world
from pagewire.sim.clients import Outcome
from pagewire.sim.costs import SLOW_STEPS
from pagewire.sim.model import VOCAB_SIZE, reference_tokens
from pagewire.sim.scenario import Scenario
from pagewire.sim.workload import Arrival
from pagewire.worker.effects import Effect

NUM_REQUESTS = 100
MAX_WAITING = 8  # more than are admitted in the second after which who was refused asks again
NUM_PROMPT_TOKENS = 6
SMALL, LARGE = 6, 28  # tokens of output
LARGE_SHARE = 10  # one of so many


def overload(scenario: Scenario, random: Random, start: float) -> Iterator[Arrival]:
    """Requests in the order of their names, more than can be served; some need more room."""
    for index in range(scenario.num_requests):
        prompt = tuple(random.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS))
        max_tokens = SMALL if index % LARGE_SHARE else LARGE
        sampling = SamplingParams(max_tokens=max_tokens)
        yield Arrival(
            time=start + scenario.arrival_s * index / scenario.num_requests,
            request_id=f"request-{index}",
            prompt=prompt,
            sampling=sampling,
            expected=[reference_tokens(prompt, sampling)],
            hangs_up_after=None,
            stops_after=None,
        )


def most_overtaken(monkeypatch: pytest.MonkeyPatch, seed: int) -> int:
    """How many younger requests were admitted, at most, while one waited or asked again."""
    admitted: list[int] = []
    num_before: dict[int, int] = {}  # admitted when a request asked first
    wait, admit = Admission.wait, Admission.admit

    def index_of(request: DecodeRequest) -> int:
        return int(request.key.request_id.removeprefix("request-"))

    def note_wait(admission: Admission, request: DecodeRequest, since: float) -> None:
        num_before.setdefault(index_of(request), len(admitted))
        wait(admission, request, since)

    def note_admit(admission: Admission) -> Iterator[tuple[DecodeRequest, int]]:
        for request, num_hit_pages in admit(admission):
            admitted.append(index_of(request))
            yield request, num_hit_pages

    monkeypatch.setattr(Admission, "wait", note_wait)
    monkeypatch.setattr(Admission, "admit", note_admit)
    monkeypatch.setattr(world, "random_workload", overload)
    scenario = Scenario(
        seed=seed,
        num_routers=3,
        num_decode=1,
        prefill_pages=200,
        decode_pages=9,
        max_waiting_handoffs=MAX_WAITING,
        num_requests=NUM_REQUESTS,
        arrival_s=14.0,
        queue_deadline_s=500.0,
        deadline_s=600.0,
        costs=SLOW_STEPS,
    )
    run = world.World(scenario)
    run.run()
    assert len(run.clients.with_outcome(Outcome.DONE)) == NUM_REQUESTS
    return max(
        sum(other > index for other in admitted[num_before[index] : position])
        for position, index in enumerate(admitted)
    )


@pytest.mark.parametrize("seed", range(2))
def test_whoever_is_refused_is_not_overtaken(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_overtaken(monkeypatch, seed) < MAX_WAITING


def test_without_their_age_refused_requests_are_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By most of those that come later: the test above would notice."""
    on_open = Handoffs._on_open

    def on_open_as_new(handoffs: Handoffs, message: Open, now: float) -> list[Effect]:
        return on_open(handoffs, replace(message, age_ms=0), now)

    monkeypatch.setattr(Handoffs, "_on_open", on_open_as_new)
    assert most_overtaken(monkeypatch, seed=0) > 3 * MAX_WAITING
