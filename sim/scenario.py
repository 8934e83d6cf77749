"""How large a run is: its workers, their capacity, its load and its faults."""

from dataclasses import dataclass
from random import Random

from pagewire.sim.costs import BALANCED, SLOW_FRAMES, SLOW_STEPS, Costs
from pagewire.sim.faults import NO_FAULTS, Faults
from pagewire.sim.kv_memory import LAYOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that a run depends on besides chance, and the seed of that."""

    seed: int
    num_routers: int = 1
    num_prefill: int = 2
    num_decode: int = 2
    prefill_pages: int = 24
    decode_pages: int = 32
    max_batch_tokens: int = 64
    max_batch_size: int = 4
    runs_ahead: bool = False  # decode steps are launched before those before them have ended
    slot_bytes: int = 2 * LAYOUT.page_bytes
    num_slots: int = 4
    max_waiting_handoffs: int = 16
    num_requests: int = 20
    arrival_s: float = 4.0  # requests and faults come in this time
    max_prompt_tokens: int = 96
    max_output_tokens: int = 16
    max_choices: int = 3  # of one request
    shared_prefix_probability: float = 0.6  # a prompt begins like an earlier one
    cancel_probability: float = 0.0
    stop_probability: float = 0.2  # that the client stops one of several choices
    max_queued: int = 64
    queue_deadline_s: float = 30.0
    deadline_s: float = 60.0
    costs: Costs = BALANCED
    faults: Faults = NO_FAULTS

    @property
    def max_model_len(self) -> int:
        return self.max_prompt_tokens + self.max_output_tokens


def random_scenario(
    seed: int,
    *,
    faults: Faults = NO_FAULTS,
    cancel_probability: float = 0.0,
    deadline_s: float = 60.0,
) -> Scenario:
    """A small cluster of random shape under a random load; every request fits every worker."""
    random = Random(f"scenario {seed}")
    return Scenario(
        seed=seed,
        num_routers=random.choice((1, 1, 2)),
        num_prefill=random.randint(1, 3),
        num_decode=random.randint(1, 3),
        prefill_pages=random.randint(7, 20),
        decode_pages=random.randint(7, 32),
        max_batch_tokens=random.choice((16, 40, 64, 128)),
        max_batch_size=random.randint(1, 6),
        slot_bytes=random.choice(
            (LAYOUT.layer_bytes, LAYOUT.page_bytes, 2 * LAYOUT.page_bytes, 3 * LAYOUT.page_bytes)
        ),
        num_slots=random.randint(1, 6),
        num_requests=random.randint(8, 16),
        arrival_s=random.choice((0.2, 1.0, 3.0)),
        cancel_probability=cancel_probability,
        deadline_s=deadline_s,
        queue_deadline_s=deadline_s / 2,
        costs=random.choice((BALANCED, SLOW_STEPS, SLOW_FRAMES)),
        faults=faults,
        max_waiting_handoffs=random.choice((1, 2, 16)),
        runs_ahead=random.choice((False, True)),
    )
