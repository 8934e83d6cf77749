"""What one step runs, and what comes of it: all that schedulers and the model runner exchange."""

from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Checked by the router and again by the worker.

    Raises ValueError, which names the field.
    """

    max_tokens: int = 16
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    seed: int = 0  # with the position it keys every random number
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence tokens among them

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be a 64-bit unsigned integer")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One sequence's part of a step."""

    request_id: str
    token_ids: Tokens[int]  # tokens to run: a chunk of the prompt, or the last sampled token
    start: int  # position of the first of them in the sequence
    page_table: Tokens[int]  # pages that hold positions 0 .. start + len(token_ids)
    sampling: SamplingParams | None  # None: a chunk that is not the last; nothing is sampled
    output_position: int = 0  # of the token that is sampled, counted in output tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one step, in the order in which its StepResult has their tokens."""

    rows: tuple[BatchRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely a sampled token was for the model, and which tokens were the most likely."""

    logprob: float  # natural logarithm, of the distribution before any sampling parameter
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), the most likely first


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step sampled, in the order of its batch's rows."""

    tokens: tuple[tuple[int, ...], ...]  # of each row; empty where nothing was to be sampled
    # By index of the row, for the rows that asked: one entry a token.
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
