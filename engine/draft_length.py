"""How many tokens to draft for a sequence: as many as pay, by what is known of both sides. Pure.

A step that checks k drafts, each right with probability p if those before it were, yields
(1 - p^(k+1)) / (1 - p) tokens on average (Leviathan et al. 2023, section 3). Set against what the
drafts cost, that has a best k, and it is 0 where drafting does not pay.
"""

from dataclasses import dataclass
from typing import NamedTuple

MAX_DRAFTS = 16
_LEAST_GAIN = 1.05  # drafting has to promise more than the error of its estimates
_MEMORY = 0.8  # how much of what was seen counts still, one drafting step later
_MOST_REMEMBERED = 8  # drafts: a long copy that has ended is soon forgotten
_PRIOR = 0.8  # share of right drafts before any was seen; counts as much as one draft
_FIRST_PAUSE = 16  # tokens
_LONGEST_PAUSE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCosts:
    """What drafts cost, in units of a decode step's constant part: reading the weights."""

    per_token: float  # one more token in a step
    per_draft: float = 0.0  # a step of the draft model; 0 where drafts are looked up

    def of_draft(self, num_rows: int) -> float:
        """One draft for each of `num_rows` rows, over a step of all of them without drafts."""
        tokens = self.per_token * num_rows
        return tokens / (1 + tokens) + self.per_draft


class DraftChoice(NamedTuple):
    """How many tokens to draft, and what that promises."""

    length: int
    gain: float  # tokens per cost, over those without drafts; 1 where length is 0


_NO_DRAFTS = DraftChoice(0, 1.0)


class DraftLength:
    """Follows the drafts of one sequence, and says how many come next.

    When none would pay, drafting pauses, for twice as long each time, so that a sequence on which
    it never pays bears the cost of ever fewer attempts; drafts that are right halve the pause.
    After it drafting begins without prejudice.
    """

    def __init__(self, costs: DraftCosts) -> None:
        self._costs = costs
        self._pause = _FIRST_PAUSE
        self._num_skipped = 0  # tokens still to go without a draft
        self._num_checked = 1.0  # drafts up to the first wrong one, fading
        self._num_right = _PRIOR

    def choose(self, limit: int, *, num_rows: int) -> DraftChoice:
        """The best length for the next step, which has `num_rows` rows: 0 to `limit`.

        A pause begins when none would pay.
        """
        if self._num_skipped or limit < 1:
            return _NO_DRAFTS
        chance = self._num_right / self._num_checked
        cost = self._costs.of_draft(num_rows)
        best = _NO_DRAFTS
        num_tokens = last_is_right = 1.0
        for length in range(1, min(limit, MAX_DRAFTS) + 1):
            last_is_right *= chance
            num_tokens += last_is_right
            gain = num_tokens / (1 + length * cost)
            if gain > max(best.gain, _LEAST_GAIN):
                best = DraftChoice(length, gain)
        if not best.length:
            self._begin_pause()
        return best

    def on_step(self, *, num_drafted: int, num_accepted: int) -> None:
        """A step has checked `num_drafted` tokens, of which the first `num_accepted` were right."""
        if not num_drafted:
            self._num_skipped = max(0, self._num_skipped - 1)
            return
        num_wrong = num_accepted < num_drafted  # what is behind a wrong draft was not tried
        memory = min(_MEMORY, _MOST_REMEMBERED / self._num_checked)
        self._num_right = memory * self._num_right + num_accepted
        self._num_checked = memory * self._num_checked + num_accepted + num_wrong
        if num_accepted > 1:
            self._pause = max(_FIRST_PAUSE, self._pause // 2)

    def _begin_pause(self) -> None:
        self._num_skipped = self._pause
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        self._num_right, self._num_checked = _PRIOR, 1.0
