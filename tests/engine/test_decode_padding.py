"""Padding of decode steps: which bucket serves how many rows, and what padding must not touch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.decode_padding import bucket_of, padding
from pagewire.kernels.ops import NO_SLOT


@given(st.sets(st.integers(1, 300), min_size=1), st.integers(1, 310))
def test_the_smallest_bucket_that_is_large_enough(sizes: set[int], num_rows: int) -> None:
    found = bucket_of(num_rows, tuple(sorted(sizes)))
    enough = {size for size in sizes if size >= num_rows}
    assert found == (min(enough) if enough else None)


def test_without_buckets_every_number_has_its_own() -> None:
    assert bucket_of(7, ()) == 7


def test_padding_stores_nothing_and_sees_one_token_of_page_0() -> None:
    step = padding(3, max_pages=5, page_size=16, device="cpu")
    batch = step.attention
    assert batch.slots.tolist() == [NO_SLOT] * 3
    assert batch.context_lens.tolist() == [1] * 3
    assert batch.cu_seqlens.tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.page_table, torch.zeros(3, 5, dtype=torch.int32))
    assert len(step.token_ids) == len(step.logits_of) == len(batch.positions) == 3
