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
from pagewire.engine.host_copies import HostCopy, to_device
from pagewire.engine.logit_adjustments import LogitAdjustments, UnreadTokens
from pagewire.engine.logprobs import PendingLogprobs
from pagewire.engine.random_numbers import uniform
from pagewire.engine.recorded_sampling import RecordedSamplingPlan
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kernels.ops import LogitsError, Ops, SamplingRows, StepRecorder

# Below it float32 could flush the quotient of two logits' difference; it is greedy anyway.
_LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """One token a row."""

    token_ids: list[int]
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]]  # by index of the rows that asked


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingTokens:
    """What a GPU was told to sample, one token a row."""

    tokens: Tensor  # int64 [num_rows], where the logits were; void when the next step samples
    copy: HostCopy  # of them
    logprobs: PendingLogprobs | None  # None: nobody asked

    def wait(self) -> SampledTokens:
        """The tokens, once they are there. Raises LogitsError."""
        token_ids = self.copy.wait().tolist()
        if token_ids and min(token_ids) < 0:
            raise LogitsError([row for row, token in enumerate(token_ids) if token < 0])
        logprobs = {} if self.logprobs is None else self.logprobs.wait()
        return SampledTokens(token_ids=token_ids, logprobs=logprobs)


class Sampler:
    """Samples batch after batch; what follows from the parameters alone is kept between steps."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._plan: _Plan | None = None
        self._recorded: dict[int, RecordedSamplingPlan] = {}  # by the address of their logits

    @torch.inference_mode()
    def record(self, recorder: StepRecorder, logits: Tensor) -> None:
        """Record the choice from logits that step after step leaves in the same memory.

        Raises NotRecordableError.
        """
        plan = RecordedSamplingPlan(self._ops, recorder, logits)
        self._recorded[logits.data_ptr()] = plan

    def sample(
        self,
        logits: Tensor,
        params: tuple[SamplingParams, ...],
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
    ) -> SampledTokens:
        """As `launch`, and wait for the tokens. Raises LogitsError."""
        return self.launch(logits, params, positions, histories).wait()

    @torch.inference_mode()
    def launch(
        self,
        logits: Tensor,
        params: tuple[SamplingParams, ...],
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
        unread: UnreadTokens | None = None,
    ) -> PendingTokens:
        """One token a row, which the host does not wait for.

        logits: float32 [num_rows, vocab_size], contiguous, changed in between but not in the end;
        positions: of the tokens to sample, counted in output tokens; histories: of the rows with
        penalties, None for others; unread: tokens that the histories lack. The order is bias,
        penalties, minimum length, temperature, top-k, top-p, min-p; temperature 0 takes the first
        of the most likely tokens.
        """
        plan = self._plan_for(params, logits)
        with plan.adjusted(logits, positions, histories, unread):
            tokens = plan.choose(logits, positions)
        logprobs = plan.logprobs(logits, tokens)
        return PendingTokens(tokens=tokens, copy=HostCopy(tokens), logprobs=logprobs)

    def _plan_for(self, params: tuple[SamplingParams, ...], logits: Tensor) -> "_Plan":
        recorded = self._recorded.get(logits.data_ptr()) if self._recorded else None
        plan = self._plan
        if plan is None or not plan.serves(params, logits, recorded):
            self._plan = plan = _Plan(self._ops, params, logits, recorded)
        return plan


class _Plan:
    """The parameters of a batch's rows as tensors, made when its composition changes."""

    def __init__(
        self,
        ops: Ops,
        params: tuple[SamplingParams, ...],
        logits: Tensor,
        recorded: RecordedSamplingPlan | None,
    ) -> None:
        vocab_size, device = logits.shape[1], logits.device
        self._key = (params, vocab_size, device, recorded)
        self._ops = ops
        self._adjustments = LogitAdjustments(params, vocab_size, device)
        rows = _sampling_rows(params, vocab_size, device)
        if recorded is not None:
            recorded.renew(rows)
        self._choice = recorded or ops.plan_sampling(rows)
        self._seeds = np.array([row.seed for row in params], dtype=np.uint64)
        # For a batch in which nothing is drawn: it uses no random number.
        self._zeros = torch.zeros(len(params), dtype=torch.float64, device=device)
        self._is_greedy = all(row.temperature == 0 for row in params)
        asked = [(i, row.num_logprobs) for i, row in enumerate(params)]
        self._num_logprobs = {i: min(n, vocab_size) for i, n in asked if n is not None}
        self._logprob_rows = to_device(np.array(list(self._num_logprobs), np.int64), device)

    def serves(
        self,
        params: tuple[SamplingParams, ...],
        logits: Tensor,
        recorded: RecordedSamplingPlan | None,
    ) -> bool:
        """Whether this is the plan for such a batch; cheap when `params` holds the same objects."""
        return self._key == (params, logits.shape[1], logits.device, recorded)

    def adjusted(
        self,
        logits: Tensor,
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
        unread: UnreadTokens | None,
    ) -> AbstractContextManager[None]:
        """Within this context bias, penalties and minimum length are in the logits."""
        if self._adjustments.is_empty:
            return nullcontext()
        return self._adjustments.applied(logits, positions, histories, unread)

    def choose(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """int64 [num_rows]."""
        if self._is_greedy:
            return self._choice.run(logits, self._zeros)
        return self._choice.run(logits, to_device(uniform(self._seeds, positions), logits.device))

    def logprobs(self, logits: Tensor, tokens: Tensor) -> PendingLogprobs | None:
        """Of the rows that asked. logits: as the model gave them, of all rows."""
        if not self._num_logprobs:
            return None
        rows = self._logprob_rows
        asked = tokens[rows].clamp_(min=0)  # of faulty rows there is none, which `wait` says
        values = self._ops.logprobs(logits, rows, asked, max(self._num_logprobs.values()))
        return PendingLogprobs(values, self._num_logprobs)


def _sampling_rows(
    params: Sequence[SamplingParams], vocab_size: int, device: torch.device
) -> SamplingRows:
    def column(values: list[float] | list[int], dtype: type[np.generic]) -> Tensor:
        return to_device(np.array(values, dtype), device)

    temperatures = [row.temperature and max(row.temperature, _LEAST_TEMPERATURE) for row in params]
    return SamplingRows(
        temperature=column(temperatures, np.float32),
        top_k=column([min(row.top_k or vocab_size, vocab_size) for row in params], np.int64),
        top_p=column([row.top_p for row in params], np.float64),
        min_p=column([row.min_p for row in params], np.float32),
        vocab_size=vocab_size,
    )
