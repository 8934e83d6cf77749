"""How many tokens to draft for a sequence: as many as pay, by what is known of both sides. Pure.

A step that checks drafts yields one token more for each that is right, up to the first wrong one
(Leviathan et al. 2023, section 3). Set against what the drafts cost, their number has an optimum,
and it is 0 where drafting does not pay.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

MAX_DRAFTS = 16

# How often the next draft is right, before any was seen. Where it is looked up: by the number of
# tokens that match before it, the last for all that are longer. In what the default model writes
# freely a third is right behind two or three tokens, and two thirds behind five or more; where it
# copies nearly all are.
LOOKUP_CHANCES = (0.0, 0.2, 0.35, 0.35, 0.45, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
MODEL_CHANCES = (0.8,)

_MOST_CHANCE = 0.98
_LEAST_GAIN = 1.05  # drafting has to promise more than the error of its estimates
_PRIOR_WEIGHT = 1.0  # right drafts that would outweigh what is expected of drafts in general
_MEMORY = 0.8  # how much of what was seen counts still, one drafting step later
_MOST_REMEMBERED = 4  # drafts: a long copy that has ended is soon forgotten
_MEMORY_OF_PAUSE = 0.98  # the same, one step without drafts later

# In steps without drafts:
_FIRST_CREDIT = 1.0
_MOST_CREDIT = 8.0  # so much can be lost when a copy ends
_CREDIT_PER_TOKEN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCosts:
    """What drafts cost, as this machine runs the model. Raises ValueError for a single step."""

    # (tokens, duration) of steps, ascending; the unit does not matter.
    steps: tuple[tuple[int, float], ...]
    per_draft: float = 0.0  # a step of the draft model, over one of the target; 0: looked up

    def __post_init__(self) -> None:
        if len(self.steps) < 2:
            raise ValueError(f"steps has {len(self.steps)} entries; it takes two to tell a cost")

    def of_drafts(self, length: int, num_rows: int) -> float:
        """`length` drafts for each of `num_rows` rows, over a step of all rows without drafts."""
        drafted, plain = self._duration(num_rows * (length + 1)), self._duration(num_rows)
        return max(0.0, drafted / plain - 1) + length * self.per_draft

    def _duration(self, num_tokens: int) -> float:
        """Of any step: on straight lines through those that were measured."""
        steps = self.steps
        index = bisect_left(steps, num_tokens, 1, len(steps) - 1, key=itemgetter(0))
        (fewer, short), (more, long) = steps[index - 1], steps[index]
        return short + (long - short) * (num_tokens - fewer) / (more - fewer)


class DraftChoice(NamedTuple):
    """How many tokens to draft, and what that promises."""

    length: int
    gain: float  # tokens per cost, over those without drafts; 1 where length is 0


NO_DRAFTS = DraftChoice(0, 1.0)


class DraftLength:
    """Follows the drafts of one sequence, and says how many come next.

    How often drafts are right is what `chances` say, times a factor by which those of late were
    right more or less often. And the sequence drafts on credit: a right draft earns the step that
    it saves and every token a hundredth of one, and no step may cost more than the credit if all
    of its drafts are wrong. So by the costs drafting never takes over 1 % and one step longer than
    a sequence without drafts, whatever the text, and beginnings are short.
    """

    def __init__(self, costs: DraftCosts, chances: Sequence[float]) -> None:
        """`chances` are LOOKUP_CHANCES, MODEL_CHANCES or the like."""
        self._costs = costs
        self._chances = chances
        self._credit = _FIRST_CREDIT
        self._num_right = 0.0  # drafts, fading
        self._num_expected = 0.0  # of the same drafts, those that should have been right
        self._num_matched = 0  # before the drafts of the step that comes or runs
        self._num_rows = 1  # of that step

    def choose(self, limit: int, *, num_rows: int, num_matched: int = 0) -> DraftChoice:
        """The best length for the next step, which has `num_rows` rows: 0 to `limit`.

        `num_matched` tokens match before what was looked up.
        """
        self._num_matched, self._num_rows = num_matched, num_rows
        best = NO_DRAFTS
        num_tokens = all_right = 1.0
        for length in range(1, min(limit, MAX_DRAFTS) + 1):
            cost = self._costs.of_drafts(length, num_rows)
            if cost > self._credit:
                break
            all_right *= self._chance(length - 1)
            num_tokens += all_right
            gain = num_tokens / (1 + cost)
            if gain > max(best.gain, _LEAST_GAIN):
                best = DraftChoice(length, gain)
        return best

    def on_step(self, *, num_drafted: int, num_accepted: int) -> None:
        """A step has checked `num_drafted` tokens, of which the first `num_accepted` were right.

        The drafts, if there are any, are those of the last choice.
        """
        cost = self._costs.of_drafts(num_drafted, self._num_rows)
        earned = num_accepted + _CREDIT_PER_TOKEN * (num_accepted + 1)
        self._credit = min(_MOST_CREDIT, self._credit + earned - cost)
        memory = _MEMORY_OF_PAUSE
        if num_drafted:
            memory = min(_MEMORY, _MOST_REMEMBERED / max(self._num_expected, _PRIOR_WEIGHT))
        # What is behind a wrong draft was not tried.
        num_checked = min(num_accepted + 1, num_drafted)
        self._num_right = memory * self._num_right + num_accepted
        self._num_expected = memory * self._num_expected + sum(map(self._prior, range(num_checked)))

    def _chance(self, index: int) -> float:
        """That a draft is right if those before it are: each of these is one more match."""
        factor = (self._num_right + _PRIOR_WEIGHT) / (self._num_expected + _PRIOR_WEIGHT)
        return min(_MOST_CHANCE, self._prior(index) * factor)

    def _prior(self, index: int) -> float:
        return self._chances[min(self._num_matched + index, len(self._chances) - 1)]
