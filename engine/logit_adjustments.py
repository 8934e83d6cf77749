"""What changes single logits before a token is chosen: bias, penalties and minimum length.

All of it is sparse: (row, token) pairs of the whole batch, gathered, changed and scattered at once.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagewire.engine.host_copies import to_device
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnreadTokens:
    """The last token of some sequences, which the host, and so their histories, do not know yet."""

    rows: frozenset[int]
    tokens: Tensor  # int64 [num_rows], on the device; of other rows than `rows` it is not read


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
        # [num_stops] each, on the host: which of them come too early depends on the step.
        self._stop_places = np.array([row * vocab_size + token for row, token, _ in early], int)
        self._stop_rows = np.array([row for row, _, _ in early], int)
        self._stop_from = np.array([num_tokens for _, _, num_tokens in early], int)
        self._penalized = [index for index, row in enumerate(params) if row.has_penalties]
        self._presence = self._floats([row.presence_penalty for row in params])  # [num_rows]
        self._frequency = self._floats([row.frequency_penalty for row in params])
        self._repetition = self._floats([row.repetition_penalty for row in params])
        self.is_empty = not (biases or early or self._penalized)

    @contextmanager
    def applied(
        self,
        logits: Tensor,
        positions: Sequence[int],
        histories: Sequence[TokenHistory | None],
        unread: UnreadTokens | None = None,
    ) -> Iterator[None]:
        """Within it `logits` have bias, then penalties, and no stop tokens that come too early.

        Afterwards they have the values that they had before: to put few numbers back is cheaper
        than a copy of all. logits: float32 [num_rows, vocab_size], contiguous; positions: counted
        in output tokens; histories: of each row, not None for one with penalties; unread: tokens
        that they lack.
        """
        edits = _Edits(logits)
        try:
            if len(self._bias):
                values = edits.read(self._bias_places)
                edits.write(self._bias_places, values, values + self._bias)
            if self._penalized:
                self._penalize(edits, self._pairs(histories, unread))
            is_early = np.asarray(positions)[self._stop_rows] < self._stop_from
            if is_early.any():
                places = self._ints(self._stop_places[is_early])
                values = edits.read(places)
                edits.write(places, values, torch.full_like(values, -math.inf))
            yield
        finally:
            edits.undo()

    def _pairs(
        self, histories: Sequence[TokenHistory | None], unread: UnreadTokens | None
    ) -> "_Pairs":
        """What the sequences with penalties hold, `unread` included."""
        known = [history for row in self._penalized if (history := histories[row]) is not None]
        assert len(known) == len(self._penalized), "a row with penalties has a history"
        pairs = _Pairs(
            rows=self._ints(np.repeat(self._penalized, [len(each.token_ids) for each in known])),
            tokens=self._ints(np.concatenate([each.token_ids for each in known])),
            counts=self._floats(np.concatenate([each.output_counts for each in known])),
        )
        rows = [row for row in self._penalized if unread is not None and row in unread.rows]
        if unread is None or not rows:
            return pairs
        return pairs.with_tokens(self._ints(rows), unread.tokens)

    def _penalize(self, edits: "_Edits", pairs: "_Pairs") -> None:
        """Penalties as OpenAI defines the first two, and Keskar et al. 2019 repetition's."""
        places = pairs.rows * self._vocab_size + pairs.tokens  # [num_pairs]
        values, repetition = edits.read(places), self._repetition[pairs.rows]
        changed = torch.where(values > 0, values / repetition, values * repetition)
        presence = self._presence[pairs.rows] * (pairs.counts > 0)
        changed -= self._frequency[pairs.rows] * pairs.counts + presence
        edits.write(places, values, changed)

    def _places(self, pairs: Iterable[tuple[int, int]]) -> Tensor:
        return self._ints([row * self._vocab_size + token for row, token in pairs])

    def _ints(self, values: Sequence[int] | np.ndarray) -> Tensor:
        return to_device(np.asarray(values, np.int64), self._device)

    def _floats(self, values: Sequence[float] | np.ndarray) -> Tensor:
        return to_device(np.asarray(values, np.float32), self._device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pairs:
    """Tokens that sequences hold."""

    rows: Tensor  # int64 [num_pairs]
    tokens: Tensor  # int64 [num_pairs]
    counts: Tensor  # float32 [num_pairs], in the output

    def with_tokens(self, rows: Tensor, tokens: Tensor) -> "_Pairs":
        """One more token for some of the sequences; a pair that is there already comes twice.

        rows: int64 [num_new], distinct; tokens: int64 [num_rows]. Nothing of them is read.
        """
        new = tokens[rows]  # [num_new]
        of_row = torch.full_like(tokens, -1).index_copy_(0, rows, new)
        is_same = of_row[self.rows] == self.tokens
        counts = self.counts + is_same
        # Of each row one pair at most is the same, so the sum is that one's count.
        total = torch.zeros_like(of_row, dtype=torch.float32)
        total.index_add_(0, self.rows, counts * is_same)
        return _Pairs(
            rows=torch.cat((self.rows, rows)),
            tokens=torch.cat((self.tokens, new)),
            counts=torch.cat((counts, total[rows].clamp_(min=1.0))),
        )


class _Edits:
    """Single logits that were overwritten, and what they were."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.view(-1)
        self._before: list[tuple[Tensor, Tensor]] = []

    def read(self, places: Tensor) -> Tensor:
        """places: int64 [num_places]."""
        return self._logits.index_select(0, places)

    def write(self, places: Tensor, before: Tensor, after: Tensor) -> None:
        """Overwrite places, which hold `before`; equal ones by equal numbers."""
        self._before.append((places, before))
        self._logits.index_copy_(0, places, after)

    def undo(self) -> None:
        """Put everything back, the last edit first."""
        for places, values in reversed(self._before):
            self._logits.index_copy_(0, places, values)
