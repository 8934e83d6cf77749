"""From logits to tokens, for all rows of a step at once.

The one random number of a token depends on (seed, output position) and on nothing else, so a
request samples the same tokens in any batch, on any worker and after a resume.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.engine import vocabulary_blocks
from pagewire.engine.batch import TokenLogprobs
from pagewire.engine.logit_adjustments import LogitAdjustments
from pagewire.engine.logprobs import token_logprobs
from pagewire.engine.random_numbers import signed_seeds, uniform
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.engine.truncation import Truncation

# Below it float32 could flush the quotient of two logits' difference; it is greedy anyway.
_LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """One token a row."""

    token_ids: list[int]
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]]  # by index of the rows that asked


class Sampler:
    """Samples batch after batch; what follows from the parameters alone is kept between steps."""

    def __init__(self) -> None:
        self._plan = _Plan((), 0, torch.device("cpu"))

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        params: tuple[SamplingParams, ...],
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
    ) -> SampledTokens:
        """One token a row.

        logits: float32 [num_rows, vocab_size]; positions: of the tokens to sample, counted in
        output tokens; histories: of the rows with penalties, None for others. The order is bias,
        penalties, minimum length, temperature, top-k, top-p, min-p; temperature 0 takes the first
        of the most likely tokens.
        """
        plan = self._plan_for(params, logits)
        position = torch.tensor(positions, dtype=torch.int64, device=logits.device)
        raw = logits[plan.logprob_rows]
        if not plan.adjustments.is_empty:
            logits = logits.clone()
            plan.adjustments.apply(logits, position, histories)
        tokens = plan.choose(logits, position)
        return SampledTokens(token_ids=tokens.tolist(), logprobs=plan.logprobs(raw, tokens))

    def _plan_for(self, params: tuple[SamplingParams, ...], logits: Tensor) -> "_Plan":
        vocab_size, device = logits.shape[1], logits.device
        if not self._plan.serves(params, vocab_size, device):
            self._plan = _Plan(params, vocab_size, device)
        return self._plan


class _Plan:
    """The parameters of a batch's rows as tensors, made when its composition changes."""

    def __init__(
        self, params: tuple[SamplingParams, ...], vocab_size: int, device: torch.device
    ) -> None:
        self._key = (params, vocab_size, device)
        self.adjustments = LogitAdjustments(params, device)
        drawn = [index for index, row in enumerate(params) if row.temperature > 0]
        rows = [params[index] for index in drawn]
        self._drawn = torch.tensor(drawn, dtype=torch.int64, device=device)  # [num_drawn]
        self._all_drawn = len(drawn) == len(params)
        self._temperature = torch.tensor(
            [[max(row.temperature, _LEAST_TEMPERATURE)] for row in rows],
            dtype=torch.float32,
            device=device,
        )
        self._seeds = signed_seeds([row.seed for row in rows]).to(device)
        self._truncation = Truncation(rows, vocab_size, device)
        asked = [(i, row.num_logprobs) for i, row in enumerate(params)]
        self._num_logprobs = {i: count for i, count in asked if count is not None}
        self.logprob_rows = torch.tensor(list(self._num_logprobs), dtype=torch.int64, device=device)

    def serves(
        self, params: tuple[SamplingParams, ...], vocab_size: int, device: torch.device
    ) -> bool:
        """Whether this is the plan for such a batch; cheap when `params` holds the same objects."""
        return self._key == (params, vocab_size, device)

    def choose(self, logits: Tensor, position: Tensor) -> Tensor:
        """int64 [num_rows]; a batch in which nothing is drawn uses no random number."""
        if not len(self._drawn):
            return vocabulary_blocks.argmax(logits)
        if self._all_drawn:
            return self._draw(logits, position)
        tokens = vocabulary_blocks.argmax(logits)
        tokens[self._drawn] = self._draw(logits[self._drawn], position[self._drawn])
        return tokens

    def _draw(self, logits: Tensor, position: Tensor) -> Tensor:
        # Differences to the maximum first: a tiny temperature gives 0 and -inf, never inf - inf.
        # In place: fresh memory for a whole batch costs more than the arithmetic on it.
        weights = logits - logits.amax(dim=-1, keepdim=True)
        weights.div_(self._temperature).exp_()
        if not self._truncation.is_empty:
            self._truncation.apply(weights)
        return vocabulary_blocks.inverse_cdf(weights, uniform(self._seeds, position))

    def logprobs(self, raw: Tensor, tokens: Tensor) -> Mapping[int, tuple[TokenLogprobs, ...]]:
        """By index of the rows that asked. raw: their logits, as the model gave them."""
        if not self._num_logprobs:
            return {}
        counts = list(self._num_logprobs.values())
        values = token_logprobs(raw, tokens[self.logprob_rows], counts)
        return dict(zip(self._num_logprobs, values, strict=True))
