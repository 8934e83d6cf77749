"""The size of the KV cache, from numbers alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.errors import MemoryBudgetError
from pagewire.engine.memory import available_bytes, choose_num_pages, parse_meminfo
from pagewire.kv_transfer.layout import KVLayout

LAYOUT = KVLayout(page_size=64, num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")


@given(
    max_model_len=st.integers(1, 200_000),
    available=st.integers(0, 1 << 40),
    share=st.floats(0.01, 1.0),
    ceiling=st.integers(0, 1 << 36),
)
def test_the_cache_fits_and_holds_one_sequence(
    max_model_len: int, available: int, share: float, ceiling: int
) -> None:
    one_sequence = LAYOUT.num_pages(max_model_len)
    if one_sequence * LAYOUT.page_bytes > available:
        with pytest.raises(MemoryBudgetError, match="lower max_model_len or free memory"):
            choose(max_model_len, available, share, ceiling)
        return
    num_pages = choose(max_model_len, available, share, ceiling)
    assert num_pages >= one_sequence
    assert num_pages * LAYOUT.page_bytes <= available
    if num_pages > one_sequence:
        assert num_pages * LAYOUT.page_bytes <= min(available * share, ceiling)


def choose(max_model_len: int, available: int, share: float, ceiling: int) -> int:
    return choose_num_pages(
        LAYOUT,
        max_model_len=max_model_len,
        available_bytes=available,
        share=share,
        ceiling_bytes=ceiling,
    )


def test_a_draft_model_takes_its_part_of_every_page() -> None:
    beside = choose_num_pages(
        LAYOUT,
        max_model_len=64,
        available_bytes=1 << 30,
        share=0.5,
        draft_page_bytes=LAYOUT.page_bytes,
    )
    assert beside == choose(64, 1 << 30, 0.5, 1 << 40) // 2


def test_the_error_has_the_numbers() -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"one sequence of 8192 tokens needs 180 MiB .* 100 MiB are free"
    ):
        choose(8192, 100 << 20, 0.5, 1 << 40)


def test_meminfo() -> None:
    assert parse_meminfo("MemTotal: 9 kB\nMemAvailable:   2048 kB\nSwapFree: 1 kB\n") == 2 << 20
    with pytest.raises(MemoryBudgetError, match="has no MemAvailable; set num_pages"):
        parse_meminfo("MemTotal: 9 kB\n")


def test_this_machine_has_some_memory() -> None:
    assert available_bytes("cpu") > 0
