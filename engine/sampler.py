"""From logits to tokens, for all rows of a step at once.

The one random number of a token depends on (seed, output position) and on nothing else, so a
request samples the same tokens in any batch, on any worker and after a resume.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagewire.engine.batch import TokenLogprobs
from pagewire.engine.logit_adjustments import LogitAdjustments
from pagewire.engine.logprobs import token_logprobs
from pagewire.engine.random_numbers import uniform
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kernels.ops import Ops, SamplingRows

# Below it float32 could flush the quotient of two logits' difference; it is greedy anyway.
_LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """One token a row."""

    token_ids: list[int]
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]]  # by index of the rows that asked


class Sampler:
    """Samples batch after batch; what follows from the parameters alone is kept between steps."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._plan: _Plan | None = None

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        params: tuple[SamplingParams, ...],
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
    ) -> SampledTokens:
        """One token a row.

        logits: float32 [num_rows, vocab_size], contiguous, changed in between but not in the end;
        positions: of the tokens to sample, counted in output tokens; histories: of the rows with
        penalties, None for others. The order is bias, penalties, minimum length, temperature,
        top-k, top-p, min-p; temperature 0 takes the first of the most likely tokens. Raises
        LogitsError.
        """
        plan = self._plan_for(params, logits)
        with plan.adjusted(logits, positions, histories):
            tokens = plan.choose(logits, positions)
        return SampledTokens(token_ids=tokens.tolist(), logprobs=plan.logprobs(logits, tokens))

    def _plan_for(self, params: tuple[SamplingParams, ...], logits: Tensor) -> "_Plan":
        vocab_size, device = logits.shape[1], logits.device
        plan = self._plan
        if plan is None or not plan.serves(params, vocab_size, device):
            self._plan = plan = _Plan(self._ops, params, vocab_size, device)
        return plan


class _Plan:
    """The parameters of a batch's rows as tensors, made when its composition changes."""

    def __init__(
        self, ops: Ops, params: tuple[SamplingParams, ...], vocab_size: int, device: torch.device
    ) -> None:
        self._key = (params, vocab_size, device)
        self._ops = ops
        self._adjustments = LogitAdjustments(params, vocab_size, device)
        self._choice = ops.plan_sampling(_sampling_rows(params, vocab_size, device))
        self._seeds = np.array([row.seed for row in params], dtype=np.uint64)
        # For a batch in which nothing is drawn: it uses no random number.
        self._zeros = torch.zeros(len(params), dtype=torch.float64, device=device)
        self._is_greedy = all(row.temperature == 0 for row in params)
        asked = [(i, row.num_logprobs) for i, row in enumerate(params)]
        self._num_logprobs = {i: min(n, vocab_size) for i, n in asked if n is not None}
        self._logprob_rows = torch.tensor(
            list(self._num_logprobs), dtype=torch.int64, device=device
        )

    def serves(
        self, params: tuple[SamplingParams, ...], vocab_size: int, device: torch.device
    ) -> bool:
        """Whether this is the plan for such a batch; cheap when `params` holds the same objects."""
        return self._key == (params, vocab_size, device)

    def adjusted(
        self, logits: Tensor, positions: Sequence[int], histories: Sequence[TokenHistory | None]
    ) -> AbstractContextManager[None]:
        """Within this context bias, penalties and minimum length are in the logits."""
        if self._adjustments.is_empty:
            return nullcontext()
        return self._adjustments.applied(logits, positions, histories)

    def choose(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """int64 [num_rows]."""
        if self._is_greedy:
            return self._choice.run(logits, self._zeros)
        numbers = uniform(self._seeds, positions)
        return self._choice.run(logits, _upload(torch.from_numpy(numbers), logits.device))

    def logprobs(self, logits: Tensor, tokens: Tensor) -> Mapping[int, tuple[TokenLogprobs, ...]]:
        """By index of the rows that asked. logits: as the model gave them, of all rows."""
        if not self._num_logprobs:
            return {}
        counts = list(self._num_logprobs.values())
        rows = self._logprob_rows
        asked = tokens[list(self._num_logprobs)]
        values = self._ops.logprobs(logits, rows, asked, max(counts))
        return dict(zip(self._num_logprobs, token_logprobs(values, counts), strict=True))


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device, without waiting for what it computes just now."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _sampling_rows(
    params: Sequence[SamplingParams], vocab_size: int, device: torch.device
) -> SamplingRows:
    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    temperatures = [row.temperature and max(row.temperature, _LEAST_TEMPERATURE) for row in params]
    return SamplingRows(
        temperature=column(temperatures, torch.float32),
        top_k=column([min(row.top_k or vocab_size, vocab_size) for row in params], torch.int64),
        top_p=column([row.top_p for row in params], torch.float64),
        min_p=column([row.min_p for row in params], torch.float32),
        vocab_size=vocab_size,
    )
