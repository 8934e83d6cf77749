"""How the tokens of one request are chosen."""

import math
from dataclasses import dataclass, replace

from pagewire.proto.choices import choice_seed

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Checked by the router and again by the worker.

    Raises ValueError, which names the field.
    """

    max_tokens: int = 16
    min_tokens: int = 0  # no stop token is sampled before
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # of the most likely token's probability; 0 is off
    presence_penalty: float = 0.0  # subtracted from tokens of the output
    frequency_penalty: float = 0.0  # the same, for every time that they occur
    repetition_penalty: float = 1.0  # divides (a negative one: multiplies), prompt included
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, addend), distinct ids
    seed: int = 0  # with the position it keys every random number
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence tokens among them
    num_logprobs: int | None = None  # how many likely tokens beside the sampled; None: none at all

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be 0 to max_tokens, {self.max_tokens}"
            )
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}; it must be 0 to 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be a 64-bit unsigned integer")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise ValueError(f"num_logprobs is {self.num_logprobs}; it must be 0 to {MAX_LOGPROBS}")
        self._check_adjustments()

    def _check_adjustments(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2.0 <= value <= 2.0:
                raise ValueError(f"{name} is {value}; it must be -2 to 2")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        for token, bias in self.logit_bias:
            if not -100.0 <= bias <= 100.0:
                raise ValueError(f"logit_bias of {token} is {bias}; it must be -100 to 100")

    def for_choice(self, choice: int) -> "SamplingParams":
        """Those of one of several choices: they differ in their seeds alone."""
        return replace(self, seed=choice_seed(self.seed, choice)) if choice else self

    @property
    def has_penalties(self) -> bool:
        """Whether sampling looks at the tokens that came before."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )
