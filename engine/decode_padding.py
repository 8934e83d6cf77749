"""Rows of padding, which let one recorded step serve every smaller number of rows.

A row of padding stores nothing and attends to one slot of page 0. What it computes is thrown away.
"""

from collections.abc import Sequence

import torch

from pagewire.engine.step_memory import StepInputs
from pagewire.kernels.ops import NO_SLOT, AttentionBatch


def bucket_of(num_rows: int, buckets: Sequence[int]) -> int | None:
    """How many rows, those of padding included, a recording of `num_rows` has; None: too many.

    `buckets`: as in StepRecorder.
    """
    if not buckets:
        return num_rows
    return next((size for size in buckets if size >= num_rows), None)


def padding(num_rows: int, *, max_pages: int, page_size: int, device: str) -> StepInputs:
    """A decode step of nothing but padding, with page tables of `max_pages`."""
    numbers = torch.arange(num_rows + 1, device=device)
    zeros = torch.zeros(num_rows, dtype=torch.int64, device=device)
    return StepInputs(
        token_ids=zeros,
        attention=AttentionBatch(
            cu_seqlens=numbers.int(),
            context_lens=torch.ones(num_rows, dtype=torch.int32, device=device),
            page_table=torch.zeros((num_rows, max_pages), dtype=torch.int32, device=device),
            positions=zeros,
            slots=torch.full_like(zeros, NO_SLOT),
            page_size=page_size,
        ),
        logits_of=numbers[:-1],
    )
