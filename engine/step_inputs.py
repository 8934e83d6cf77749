"""Lays the rows of a Batch out as the tensors that a model reads, in one pass over plain arrays.

The only place where page tables and token ids of schedulers reach memory: what is out of range
raises here, before anything is written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pagewire.engine.batch import BatchRow
from pagewire.engine.step_memory import IntArray, StepArrays, StepMemory, StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLimits:
    """What the indices of a step must stay below."""

    vocab_size: int
    num_pages: int
    page_size: int
    max_model_len: int


def prepare(rows: Sequence[BatchRow], limits: InputLimits, memory: StepMemory) -> StepArrays:
    """Check and lay out the rows of a step; void once `memory` is used for the next one.

    Raises ValueError, which names the request, for an empty row, a token id or page out of range, a
    page table that is too short and a position beyond max_model_len. Pages behind those that a row
    needs are not read, and so not checked.
    """
    starts = _array((row.start for row in rows), len(rows))
    lengths = _array((len(row.token_ids) for row in rows), len(rows))
    contexts = starts + lengths
    num_pages = -(-contexts // limits.page_size)
    _require_extents(rows, starts, lengths, num_pages, limits)
    ends = lengths.cumsum()
    num_tokens = int(ends[-1])
    token_ids = _array(chain.from_iterable(row.token_ids for row in rows), num_tokens)
    _require_below(limits.vocab_size, "token id", token_ids, lengths, rows)
    pages = _array(
        chain.from_iterable(
            row.page_table[:count] for row, count in zip(rows, num_pages.tolist(), strict=True)
        ),
        int(num_pages.sum()),
    )
    _require_below(limits.num_pages, "page", pages, num_pages, rows)
    num_logits = [row.num_drafts + 1 if row.sampling else 0 for row in rows]

    arrays = memory.arrays(
        StepShape(
            num_rows=len(rows),
            num_tokens=num_tokens,
            max_pages=int(num_pages.max()),
            num_logits=sum(num_logits),
            page_size=limits.page_size,
        )
    )
    arrays.token_ids[:] = token_ids
    arrays.cu_seqlens[1:] = ends
    arrays.context_lens[:] = contexts
    page_table = arrays.page_table
    page_table.fill(0)
    page_table[np.arange(page_table.shape[1]) < num_pages[:, None]] = pages
    if num_tokens == len(rows):  # a decode step: one token a row
        row_of_token = np.arange(len(rows))
        arrays.positions[:] = starts
    else:
        row_of_token = np.arange(len(rows)).repeat(lengths)
        np.add(np.arange(num_tokens), (contexts - ends)[row_of_token], out=arrays.positions)
    page_index, offset = np.divmod(arrays.positions, limits.page_size)
    arrays.slots[:] = page_table[row_of_token, page_index]
    arrays.slots *= limits.page_size  # in 64 bits, unlike page_table
    arrays.slots += offset
    if num_tokens == len(num_logits) == sum(num_logits):
        arrays.logits_of[:] = row_of_token
    else:
        arrays.logits_of[:] = _last_tokens(ends, np.array(num_logits))
    return arrays


def _last_tokens(ends: IntArray, counts: IntArray) -> IntArray:
    """The indices of the last `counts` tokens before each of `ends`."""
    behind = np.arange(int(counts.sum())) - (counts.cumsum() - counts).repeat(counts)
    return (ends - counts).repeat(counts) + behind


def _require_extents(
    rows: Sequence[BatchRow],
    starts: IntArray,
    lengths: IntArray,
    num_pages: IntArray,
    limits: InputLimits,
) -> None:
    """Each row runs tokens, inside the model's context, and has the pages for them."""
    held = _array((len(row.page_table) for row in rows), len(rows))
    misplaced = (lengths < 1) | (starts < 0) | (starts + lengths > limits.max_model_len)
    refused = misplaced | (held < num_pages)
    if not refused.any():
        return
    index = int(refused.argmax())
    row, end = rows[index].request_id, starts[index] + lengths[index]
    if misplaced[index]:
        raise ValueError(
            f"request {row} runs positions {starts[index]} to {end}; they must be at least one "
            f"and lie below max_model_len, {limits.max_model_len}"
        )
    raise ValueError(
        f"request {row} has {held[index]} pages for {end} tokens; it needs {num_pages[index]}"
    )


def _require_below(
    limit: int, what: str, values: IntArray, counts: IntArray, rows: Sequence[BatchRow]
) -> None:
    """All values of all rows at once; `counts` says how many of them are whose."""
    # Seen as unsigned, a negative number is a huge one, so one maximum is the whole check.
    if int(values.view(np.uint64).max()) < limit:
        return
    for row, mine in zip(rows, np.split(values, counts.cumsum()[:-1]), strict=True):
        if mine.min() < 0 or mine.max() >= limit:
            raise ValueError(
                f"request {row.request_id} has {what}s from {mine.min()} to {mine.max()}; "
                f"they must be 0 to {limit - 1}"
            )


def _array(values: Iterable[int], count: int) -> IntArray:
    return np.fromiter(values, np.int64, count)
