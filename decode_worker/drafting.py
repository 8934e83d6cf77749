"""Speculative decoding on a decode worker: who drafts for a sequence, and how much. Pure.

`engine/speculative.py` says why drafts never change a token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pagewire.engine.batch import DraftWork
from pagewire.engine.draft_length import DraftCosts, DraftLength
from pagewire.engine.model_drafter import ModelDrafter
from pagewire.engine.ngram_drafter import NgramDrafter
from pagewire.engine.sampling_params import SamplingParams

# What a draft model has not seen of a sequence that it drafts for in every step: the newest token,
# and the draft before it if that was the last of its step.
_NEWEST_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How the sequences of a decode worker are drafted for."""

    max_draft_tokens: int  # for all rows of a step together
    costs: DraftCosts
    draft_model_len: int | None = None  # context of the draft model; None: drafts are looked up
    max_unseen_tokens: int = 64  # of prompts, that a draft model reads in one step to catch up

    def drafting(self, token_ids: Iterable[int], sampling: SamplingParams) -> "Drafting | None":
        """For a sequence with this prompt. None under penalties: these look at every token before,
        so that the tokens in the places of drafts cannot be sampled together.
        """
        if sampling.has_penalties:
            return None
        drafter: NgramDrafter | ModelDrafter
        if self.draft_model_len is None:
            drafter = NgramDrafter(token_ids)
        else:
            drafter = ModelDrafter(token_ids, max_model_len=self.draft_model_len)
        return Drafting(drafter, DraftLength(self.costs))

    def plan(self, draftings: "Sequence[Drafting | None]", nums_left: Sequence[int]) -> None:
        """Share the drafts of a step, and what a draft model may read, out among its rows.

        nums_left: tokens that each sequence may have yet; each bounds its drafts, since a step
        samples one token behind them.
        """
        num_rows = len(draftings)
        num_readable = self.max_unseen_tokens
        for drafting, num_left in zip(draftings, nums_left, strict=True):
            if drafting is not None:
                drafting.plan(
                    min(self.max_draft_tokens // num_rows, num_left - 1),
                    num_rows=num_rows,
                    num_left=num_left,
                    max_unseen=max(num_readable, _NEWEST_TOKENS),
                )
                num_readable -= drafting.num_unseen


class Drafting:
    """The drafts of one sequence: those of the step that runs or comes next, and how many pay."""

    def __init__(self, drafter: NgramDrafter | ModelDrafter, length: DraftLength) -> None:
        self._drafter = drafter
        self._length = length
        self.token_ids: tuple[int, ...] = ()  # drafts that are known when the step is planned
        self.work: DraftWork | None = None  # for a draft model, which makes them in the step

    @property
    def num_drafts(self) -> int:
        return self.work.num_drafts if self.work else len(self.token_ids)

    @property
    def num_unseen(self) -> int:
        """Tokens of the sequence that the draft model reads in the step."""
        return len(self.work.token_ids) if self.work else 0

    def plan(self, limit: int, *, num_rows: int, num_left: int, max_unseen: int) -> None:
        """Choose the drafts of the next step, at most `limit`. Arguments as in ModelDrafter."""
        num_drafts = self._length.choose(limit, num_rows=num_rows)
        match self._drafter:
            case NgramDrafter() as lookup:
                self.token_ids = lookup.propose(num_drafts) if num_drafts else ()
            case ModelDrafter() as model:
                self.work = model.plan(num_drafts, num_left=num_left, max_unseen=max_unseen)

    def on_step(self, num_accepted: int) -> None:
        """The step has run, and the first `num_accepted` of its drafts were right."""
        self._length.on_step(num_drafted=self.num_drafts, num_accepted=num_accepted)
        if self.work is not None and isinstance(self._drafter, ModelDrafter):
            self._drafter.on_step(self.work, num_accepted)
        self.token_ids, self.work = (), None

    def extend(self, token_id: int) -> None:
        """`token_id` is the next token of the sequence."""
        self._drafter.extend((token_id,))
