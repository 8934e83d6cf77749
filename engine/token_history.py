"""Which tokens a sequence holds: what penalties look at.

Sparse and incremental: as long as its distinct tokens, and a step adds one token. Both workers
build it from the prompt and the output so far, as whoever resumes a stream can.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pagewire.engine.sampling_params import SamplingParams


class TokenHistory:
    """Distinct tokens of a prompt and its output, with their counts in the output."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()) -> None:
        distinct = np.unique(np.fromiter(prompt, dtype=np.int64))
        self._num_distinct = len(distinct)
        self._index = {int(token): index for index, token in enumerate(distinct)}
        self._token_ids = distinct
        self._output_counts = np.zeros(len(distinct), dtype=np.float32)
        for token in output:
            self.append(token)

    @classmethod
    def for_params(
        cls, params: SamplingParams, prompt: Iterable[int], output: Iterable[int] = ()
    ) -> "TokenHistory | None":
        """None where no penalty would look at it."""
        return cls(prompt, output) if params.has_penalties else None

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Distinct token ids, [num_distinct]."""
        return self._token_ids[: self._num_distinct]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        """How often each was sampled, [num_distinct]; 0 for one of the prompt alone."""
        return self._output_counts[: self._num_distinct]

    def append(self, token_id: int) -> None:
        """`token_id` is the next token of the output."""
        index = self._index.setdefault(token_id, self._num_distinct)
        if index == self._num_distinct:
            self._grow()
            self._token_ids[index] = token_id
            self._num_distinct += 1
        self._output_counts[index] += 1

    def _grow(self) -> None:
        """Make room for one more, at amortised constant cost."""
        capacity = len(self._token_ids)
        if self._num_distinct == capacity:
            added = max(capacity, 64)
            self._token_ids = np.pad(self._token_ids, (0, added))
            self._output_counts = np.pad(self._output_counts, (0, added))
