"""What changes single logits before a token is chosen: bias, penalties and minimum length.

All of it is sparse: (row, token) pairs of the whole batch, gathered, changed and scattered at once.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory


class LogitAdjustments:
    """The adjustments of a batch's rows, as tensors; a place is row * vocab_size + token id."""

    def __init__(
        self, params: Sequence[SamplingParams], vocab_size: int, device: torch.device
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        biases = [(i, *pair) for i, row in enumerate(params) for pair in row.logit_bias]
        self._bias_places = self._places((row, token) for row, token, _ in biases)  # [num_biases]
        self._bias = self._floats([bias for _, _, bias in biases])
        early = [
            (index, token, row.min_tokens)
            for index, row in enumerate(params)
            if row.min_tokens
            for token in sorted(row.stop_token_ids)
        ]
        self._stop_places = self._places((row, token) for row, token, _ in early)  # [num_stops]
        self._stop_rows = self._ints([row for row, _, _ in early])
        self._stop_from = self._ints([num_tokens for _, _, num_tokens in early])
        self._penalized = [index for index, row in enumerate(params) if row.has_penalties]
        self._presence = self._floats([row.presence_penalty for row in params])  # [num_rows]
        self._frequency = self._floats([row.frequency_penalty for row in params])
        self._repetition = self._floats([row.repetition_penalty for row in params])
        self.is_empty = not (biases or early or self._penalized)

    @contextmanager
    def applied(
        self, logits: Tensor, positions: Sequence[int], histories: Sequence[TokenHistory | None]
    ) -> Iterator[None]:
        """Within it `logits` have bias, then penalties, and no stop tokens that come too early.

        Afterwards they have the values that they had before: to put few numbers back is cheaper
        than a copy of all. logits: float32 [num_rows, vocab_size], contiguous; positions: counted
        in output tokens; histories: of each row, not None for one with penalties.
        """
        edits = _Edits(logits)
        try:
            if len(self._bias):
                values = edits.read(self._bias_places)
                edits.write(self._bias_places, values, values + self._bias)
            if self._penalized:
                self._penalize(edits, [histories[index] for index in self._penalized])
            if len(self._stop_places):
                is_early = self._ints(positions)[self._stop_rows] < self._stop_from
                places = self._stop_places[is_early]
                values = edits.read(places)
                edits.write(places, values, torch.full_like(values, -math.inf))
            yield
        finally:
            edits.undo()

    def _penalize(self, edits: "_Edits", histories: Sequence[TokenHistory | None]) -> None:
        """Penalties as OpenAI defines the first two, and Keskar et al. 2019 repetition's."""
        known = [history for history in histories if history is not None]
        assert len(known) == len(histories), "a row with penalties has a history"
        lengths = [len(history.token_ids) for history in known]
        row_of_pair = np.repeat(self._penalized, lengths)
        token_ids = np.concatenate([history.token_ids for history in known])
        places = self._ints(row_of_pair * self._vocab_size + token_ids)  # [num_pairs]
        rows = self._ints(row_of_pair)
        counts = self._floats(np.concatenate([history.output_counts for history in known]))
        values, repetition = edits.read(places), self._repetition[rows]
        changed = torch.where(values > 0, values / repetition, values * repetition)
        changed -= self._frequency[rows] * counts + self._presence[rows] * (counts > 0)
        edits.write(places, values, changed)

    def _places(self, pairs: Iterable[tuple[int, int]]) -> Tensor:
        return self._ints([row * self._vocab_size + token for row, token in pairs])

    def _ints(self, values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: Sequence[float] | np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self._device)


class _Edits:
    """Single logits that were overwritten, and what they were."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.view(-1)
        self._before: list[tuple[Tensor, Tensor]] = []

    def read(self, places: Tensor) -> Tensor:
        """places: int64 [num_places]."""
        return self._logits.index_select(0, places)

    def write(self, places: Tensor, before: Tensor, after: Tensor) -> None:
        """Overwrite distinct places, which hold `before`."""
        self._before.append((places, before))
        self._logits.index_copy_(0, places, after)

    def undo(self) -> None:
        """Put everything back, the last edit first."""
        for places, values in reversed(self._before):
            self._logits.index_copy_(0, places, values)
