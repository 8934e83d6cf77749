"""Lays the rows of a Batch out as the tensors that a model reads, in one pass over plain arrays.

The only place where page tables and token ids of schedulers reach memory: what is out of range
raises here, before anything is written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagewire.engine.batch import BatchRow
from pagewire.kernels.ops import AttentionBatch

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLimits:
    """What the indices of a step must stay below."""

    vocab_size: int
    num_pages: int
    page_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """What one forward step reads besides weights and KV."""

    token_ids: Tensor  # int64 [num_tokens]
    attention: AttentionBatch
    # int64 [num_logits]: of each row that samples the last token, and those before its drafts
    logits_of: Tensor


def prepare(rows: Sequence[BatchRow], limits: InputLimits, device: torch.device) -> StepInputs:
    """Check and lay out the rows of a step.

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

    page_table = np.zeros((len(rows), int(num_pages.max())), dtype=np.int32)
    page_table[np.arange(page_table.shape[1]) < num_pages[:, None]] = pages
    if num_tokens == len(rows):  # a decode step: one token a row
        positions, row_of_token = starts, np.arange(len(rows))
    else:
        row_of_token = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(num_tokens) + (contexts - ends)[row_of_token]
    page_index, offset = np.divmod(positions, limits.page_size)
    slots = page_table[row_of_token, page_index].astype(np.int64) * limits.page_size + offset
    num_logits = _array((row.num_drafts + 1 if row.sampling else 0 for row in rows), len(rows))
    return StepInputs(
        token_ids=_tensor(token_ids, device),
        attention=AttentionBatch(
            cu_seqlens=_tensor(np.concatenate(([0], ends)).astype(np.int32), device),
            context_lens=_tensor(contexts.astype(np.int32), device),
            page_table=_tensor(page_table, device),
            positions=_tensor(positions, device),
            slots=_tensor(slots, device),
            page_size=limits.page_size,
        ),
        logits_of=_tensor(_last_tokens(ends, num_logits), device),
    )


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
    short = held < num_pages
    if misplaced.any():
        index = int(misplaced.argmax())
        raise ValueError(
            f"request {rows[index].request_id} runs positions {starts[index]} to "
            f"{starts[index] + lengths[index]}; they must be at least one and lie below "
            f"max_model_len, {limits.max_model_len}"
        )
    if short.any():
        index = int(short.argmax())
        raise ValueError(
            f"request {rows[index].request_id} has {held[index]} pages for "
            f"{starts[index] + lengths[index]} tokens; it needs {num_pages[index]}"
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


def _tensor(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
