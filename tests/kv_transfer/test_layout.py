"""Layout arithmetic: frames cover every page and layer once, runs every byte of a frame once."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.kv_transfer.layout import (
    DTYPE_BYTES,
    PAGE_SIZES,
    FrameRange,
    KVLayout,
    LayoutError,
    byte_runs,
    plan_frames,
)

layouts = st.builds(
    KVLayout,
    page_size=st.sampled_from(PAGE_SIZES),
    num_layers=st.integers(1, 12),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 8, 64]),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)


@given(layouts, st.integers(0, 10), st.integers(0, 12), st.data())
def test_frames_cover_every_page_and_layer_once(
    layout: KVLayout, first_page: int, num_pages: int, data: st.DataObject
) -> None:
    slot_bytes = data.draw(st.integers(layout.layer_bytes, 4 * layout.page_bytes))
    frames = list(plan_frames(layout, first_page, first_page + num_pages, slot_bytes))
    covered = Counter(
        (page, layer)
        for frame in frames
        for page in range(frame.first_page, frame.first_page + frame.num_pages)
        for layer in range(frame.first_layer, frame.first_layer + frame.num_layers)
    )
    assert covered == Counter(
        (page, layer)
        for page in range(first_page, first_page + num_pages)
        for layer in range(layout.num_layers)
    )
    assert all(0 < frame.num_bytes(layout) <= slot_bytes for frame in frames)
    assert frames == sorted(frames)


@given(layouts, st.data())
def test_runs_cover_every_byte_of_a_frame_in_payload_order(
    layout: KVLayout, data: st.DataObject
) -> None:
    page_table = tuple(data.draw(st.permutations(range(8))))
    first_page = data.draw(st.integers(0, 7))
    first_layer = data.draw(st.integers(0, layout.num_layers - 1))
    frame = FrameRange(
        first_page=first_page,
        num_pages=data.draw(st.integers(1, 8 - first_page)),
        first_layer=first_layer,
        num_layers=data.draw(st.integers(1, layout.num_layers - first_layer)),
    )
    runs = list(byte_runs(layout, frame, page_table))
    # [num_pages, num_layers]: where each layer of each page lies, in payload order
    expected = [
        page_table[page] * layout.page_bytes + layer * layout.layer_bytes
        for page in range(first_page, first_page + frame.num_pages)
        for layer in range(first_layer, first_layer + frame.num_layers)
    ]
    found = [
        start
        for offset, length in runs
        for start in range(offset, offset + length, layout.layer_bytes)
    ]
    assert found == expected
    assert sum(length for _, length in runs) == frame.num_bytes(layout)
    assert all(length % layout.layer_bytes == 0 for _, length in runs)


@given(layouts)
def test_sizes_agree(layout: KVLayout) -> None:
    assert layout.page_bytes == layout.num_layers * layout.num_kv_heads * layout.head_bytes
    assert layout.num_pages(0) == 0
    assert layout.num_pages(1) == layout.num_pages(layout.page_size) == 1
    assert layout.num_pages(layout.page_size + 1) == 2


def test_int8_pages_hold_their_scales() -> None:
    sizes = {"page_size": 64, "num_layers": 30, "num_kv_heads": 3, "head_dim": 64}
    in_8_bits, in_16_bits = (KVLayout(**sizes, dtype=dtype) for dtype in ("int8", "bfloat16"))
    assert in_8_bits.head_bytes == 2 * 64 * (64 + 4)
    assert in_16_bits.page_bytes / in_8_bits.page_bytes == pytest.approx(128 / 68)


@given(layouts, layouts)
def test_digests_tell_layouts_apart(mine: KVLayout, theirs: KVLayout) -> None:
    assert len(mine.digest()) == 16
    assert (mine.digest() == theirs.digest()) == (mine == theirs)


def test_a_whole_sequence_in_order_is_one_run() -> None:
    layout = KVLayout(page_size=16, num_layers=2, num_kv_heads=1, head_dim=8, dtype="float16")
    frame = FrameRange(first_page=0, num_pages=3, first_layer=0, num_layers=2)
    assert list(byte_runs(layout, frame, (4, 5, 6))) == [
        (4 * layout.page_bytes, 3 * layout.page_bytes)
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [("page_size", 24), ("dtype", "fp8"), ("num_layers", 0), ("head_dim", -1)],
)
def test_impossible_layouts_name_the_field(field: str, value: object) -> None:
    fields = {
        "page_size": 16,
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "dtype": "float16",
        field: value,
    }
    with pytest.raises(LayoutError, match=field):
        KVLayout(**fields)  # type: ignore[arg-type]


def test_a_slot_too_small_for_one_layer() -> None:
    layout = KVLayout(page_size=16, num_layers=2, num_kv_heads=1, head_dim=8, dtype="float16")
    with pytest.raises(LayoutError, match="raise slot_bytes"):
        list(plan_frames(layout, 0, 1, layout.layer_bytes - 1))
