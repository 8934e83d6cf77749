"""What one step runs, and what comes of it: all that schedulers and the model runner exchange."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftWork:
    """What a draft model runs for a row before the step."""

    token_ids: Tokens[int]  # of the sequence, which it has not seen
    start: int  # position of the first of them in the sequence
    num_drafts: int  # to propose behind them; 0: they do not reach the end of the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One sequence's part of a step."""

    request_id: str
    token_ids: Tokens[int]  # tokens to run: a chunk of the prompt, or the last sampled token
    start: int  # position of the first of them in the sequence
    page_table: Tokens[int]  # pages that hold positions 0 .. start + len(token_ids)
    sampling: SamplingParams | None  # None: a chunk that is not the last; nothing is sampled
    output_position: int = 0  # of the token that is sampled, counted in output tokens
    history: TokenHistory | None = None  # prompt and output; set where `sampling` has penalties
    # Index of the row, in the step launched before, whose sampled token this row runs. The host may
    # not know it yet: it is not in `history`, and another stands in its place in `token_ids`.
    follows: int | None = None
    num_drafts: int = 0  # how many of `token_ids`, the last ones, are proposed and not sampled
    draft_work: DraftWork | None = None  # for a draft model, which adds drafts to `token_ids`
    # One more token for each, from the same logits: the other choices of a prompt. Without drafts.
    siblings: tuple[SamplingParams, ...] = ()

    @property
    def num_samples(self) -> int:
        """Tokens that the step samples for this row."""
        return 1 + self.num_drafts + len(self.siblings) if self.sampling else 0


class PageCopy(NamedTuple):
    """One page's content, in all layers, from a page to another."""

    source: int
    destination: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one step, in the order in which its StepResult has their tokens."""

    rows: tuple[BatchRow, ...]
    copies: tuple[PageCopy, ...] = ()  # made before any row runs
    layer_group_ends: tuple[int, ...] = ()  # numbers of layers after which the step says so

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


# Told by a step that runs, in the model's thread: the KV of all rows in its first layers lies in
# pages. The argument is their number, one of the batch's `layer_group_ends`.
OnLayersDone = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely a sampled token was for the model, and which tokens were the most likely."""

    logprob: float  # natural logarithm, of the distribution before any sampling parameter
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), the most likely first


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step sampled, in the order of its batch's rows."""

    # Of each row: empty where nothing was to be sampled; more than one where drafts were right, or
    # for siblings.
    tokens: tuple[tuple[int, ...], ...]
    # By index of the row, for the rows that asked: one entry a token.
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


def with_known_tokens(batch: Batch, previous: StepResult) -> Batch:
    """A batch whose rows followed those of the step before, now that its result is there."""
    rows = (
        row
        if row.follows is None
        else replace(row, token_ids=previous.tokens[row.follows], follows=None)
        for row in batch.rows
    )
    return replace(batch, rows=tuple(rows))
