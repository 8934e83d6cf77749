"""What changes single logits before a token is chosen: bias, penalties and minimum length.

All of it is sparse: (row, token) pairs of the whole batch, gathered, changed and scattered at once.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory


class LogitAdjustments:
    """The adjustments of a batch's rows, as tensors."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self._device = device
        biases = [(i, *pair) for i, row in enumerate(params) for pair in row.logit_bias]
        self._bias_rows = self._ints([row for row, _, _ in biases])  # [num_biases]
        self._bias_tokens = self._ints([token for _, token, _ in biases])
        self._bias = self._floats([bias for _, _, bias in biases])
        early = [
            (index, token, row.min_tokens)
            for index, row in enumerate(params)
            if row.min_tokens
            for token in sorted(row.stop_token_ids)
        ]
        self._stop_rows = self._ints([row for row, _, _ in early])  # [num_stops]
        self._stop_tokens = self._ints([token for _, token, _ in early])
        self._stop_from = self._ints([num_tokens for _, _, num_tokens in early])
        self._penalized = [index for index, row in enumerate(params) if row.has_penalties]
        self._presence = self._floats([row.presence_penalty for row in params])  # [num_rows]
        self._frequency = self._floats([row.frequency_penalty for row in params])
        self._repetition = self._floats([row.repetition_penalty for row in params])
        self.is_empty = not (biases or early or self._penalized)

    @contextmanager
    def applied(
        self, logits: Tensor, positions: Tensor, histories: Sequence[TokenHistory | None]
    ) -> Iterator[None]:
        """Within it `logits` have bias, then penalties, and no stop tokens that come too early.

        Afterwards they have the values that they had before: to put few numbers back is cheaper
        than a copy of all. logits: float32 [num_rows, vocab_size]; positions: int64 [num_rows],
        counted in output tokens; histories: of each row, not None for one with penalties.
        """
        edits = _Edits(logits)
        try:
            if len(self._bias):
                biased = logits[self._bias_rows, self._bias_tokens] + self._bias
                edits.write(self._bias_rows, self._bias_tokens, biased)
            if self._penalized:
                self._penalize(logits, [histories[index] for index in self._penalized], edits)
            if len(self._stop_rows):
                is_early = positions[self._stop_rows] < self._stop_from
                never = self._floats([-math.inf])
                edits.write(self._stop_rows[is_early], self._stop_tokens[is_early], never)
            yield
        finally:
            edits.undo()

    def _penalize(
        self, logits: Tensor, histories: Sequence[TokenHistory | None], edits: "_Edits"
    ) -> None:
        """Penalties as OpenAI defines the first two, and Keskar et al. 2019 repetition's."""
        known = [history for history in histories if history is not None]
        assert len(known) == len(histories), "a row with penalties has a history"
        lengths = [len(history.token_ids) for history in known]
        rows = self._ints(np.repeat(self._penalized, lengths))  # [num_pairs]
        tokens = self._ints(np.concatenate([history.token_ids for history in known]))
        counts = self._floats(np.concatenate([history.output_counts for history in known]))
        values, repetition = logits[rows, tokens], self._repetition[rows]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= self._frequency[rows] * counts + self._presence[rows] * (counts > 0)
        edits.write(rows, tokens, values)

    def _ints(self, values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: Sequence[float] | np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self._device)


class _Edits:
    """Single logits that were overwritten, and what they were."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []

    def write(self, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
        """Overwrite distinct (row, token) pairs; rows, tokens: int64 [num_pairs]."""
        self._before.append((rows, tokens, self._logits[rows, tokens]))
        self._logits[rows, tokens] = values

    def undo(self) -> None:
        """Put everything back, the last edit first."""
        for rows, tokens, values in reversed(self._before):
            self._logits[rows, tokens] = values
