"""How long things take under virtual time."""

from dataclasses import dataclass
from random import Random

from pagewire.engine.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Durations in seconds, each as likely as the other."""

    low: float
    high: float

    def draw(self, random: Random) -> float:
        return random.uniform(self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Ranges are wide, so that what can overlap does."""

    latency: Range = Range(low=0.0002, high=0.01)  # one way, any message
    gather: Range = Range(low=0.0001, high=0.004)  # until a frame's checksum is known
    wire: Range = Range(low=0.0005, high=0.02)  # one frame's payload, at either end
    scatter: Range = Range(low=0.0001, high=0.01)  # one frame, from its slot into pages
    notice: Range = Range(low=0.0, high=0.2)  # until one end knows that a connection is gone
    step_s: float = 0.005
    prompt_token_s: float = 0.0005
    sequence_s: float = 0.0005
    jitter: Range = Range(low=0.5, high=2.0)  # factor of a step's duration

    def step(self, batch: Batch, random: Random) -> float:
        """Seconds of one step of the model."""
        work = self.step_s + self.sequence_s * len(batch.rows)
        return (work + self.prompt_token_s * batch.num_tokens) * self.jitter.draw(random)


BALANCED = Costs()
SLOW_STEPS = Costs(step_s=0.1)
SLOW_FRAMES = Costs(
    gather=Range(low=0.0, high=0.1),
    wire=Range(low=0.0, high=0.1),
    scatter=Range(low=0.0, high=0.3),
)
