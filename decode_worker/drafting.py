"""Speculative decoding on a decode worker: who drafts for a sequence, and how much. Pure.

`engine/speculative.py` says why drafts never change a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pagewire.engine.batch import DraftWork
from pagewire.engine.draft_length import (
    LOOKUP_CHANCES,
    MODEL_CHANCES,
    NO_DRAFTS,
    DraftCosts,
    DraftLength,
)
from pagewire.engine.model_drafter import ModelDrafter
from pagewire.engine.ngram_drafter import NgramDrafter
from pagewire.engine.sampling_params import SamplingParams

# What a draft model has not seen of a sequence that it drafts for in every step: the newest token,
# and the draft before it if that was the last of its step.
_NEWEST_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDrafts:
    """What a draft model is to do for one sequence, and how many of its drafts pay."""

    drafter: ModelDrafter
    length: DraftLength


class Drafting:
    """The drafts of one sequence: those of the step that runs or comes next, and how many pay.

    They are looked up where the newest tokens occurred before; where there is a draft model, only
    if that promises more than the model's drafts.
    """

    def __init__(
        self, lookup: NgramDrafter, length: DraftLength, model: ModelDrafts | None = None
    ) -> None:
        """`length` is of the drafts that are looked up."""
        self._lookup = lookup
        self._length = length
        self._model = model
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
        self.token_ids, self.work = (), None
        match, found, made = self._lookup.match(), NO_DRAFTS, NO_DRAFTS
        if match is not None:
            found = self._length.choose(limit, num_rows=num_rows, num_matched=match.num_tokens)
        if self._model is not None:
            made = self._model.length.choose(limit, num_rows=num_rows)
        if match is not None and found.gain > made.gain:
            self.token_ids = self._lookup.continuation(match, found.length)
        elif self._model is not None:
            self.work = self._model.drafter.plan(
                made.length, num_left=num_left, max_unseen=max_unseen
            )

    def on_step(self, num_accepted: int) -> None:
        """The step has run, and the first `num_accepted` of its drafts were right."""
        _follow(self._length, len(self.token_ids), num_accepted)
        if self._model is not None:
            _follow(self._model.length, self.work.num_drafts if self.work else 0, num_accepted)
            if self.work is not None:
                self._model.drafter.on_step(self.work, num_accepted)
        self.token_ids, self.work = (), None

    def extend(self, token_id: int) -> None:
        """`token_id` is the next token of the sequence."""
        self._lookup.extend((token_id,))
        if self._model is not None:
            self._model.drafter.extend((token_id,))


def _follow(length: DraftLength, num_drafted: int, num_accepted: int) -> None:
    """Tell one of the two of a step, whose drafts may have been the other's."""
    length.on_step(num_drafted=num_drafted, num_accepted=min(num_accepted, num_drafted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How the sequences of a decode worker are drafted for."""

    max_draft_tokens: int  # for all rows of a step together
    costs: DraftCosts
    draft_model_len: int | None = None  # context of the draft model; None: there is none
    max_unseen_tokens: int = 32  # of prompts, that a draft model reads in one step to catch up

    def drafting(self, token_ids: Sequence[int], sampling: SamplingParams) -> Drafting | None:
        """For a sequence with this prompt. None under penalties: these look at every token before,
        so that the tokens in the places of drafts cannot be sampled together.
        """
        if sampling.has_penalties:
            return None
        lookup = NgramDrafter(token_ids)
        length = DraftLength(replace(self.costs, per_draft=0.0), LOOKUP_CHANCES)
        if self.draft_model_len is None:
            return Drafting(lookup, length)
        drafter = ModelDrafter(token_ids, max_model_len=self.draft_model_len)
        model = ModelDrafts(drafter=drafter, length=DraftLength(self.costs, MODEL_CHANCES))
        return Drafting(lookup, length, model)

    def plan(self, draftings: Sequence[Drafting | None], nums_left: Sequence[int]) -> None:
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
