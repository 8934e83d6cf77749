"""Pages of several ranks, each on a device of its own, to host memory and back.

The devices are the CPU, and make their copies when a test says so.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from held_copies import HeldCompletion, HeldCopies
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.engine.device_shards import DeviceShards
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_scatter import KVScatter
from pagewire.engine.kv_shards import KVShards
from pagewire.kv_transfer.layout import FrameRange, KVLayout, LayoutError
from pagewire.kv_transfer.reshard import HeadSplit

NUM_KV_HEADS = 4
NUM_PAGES = 9
LAYOUT = KVLayout(
    page_size=16, num_layers=3, num_kv_heads=NUM_KV_HEADS, head_dim=8, dtype="float32"
)
PART = FrameRange(first_page=1, num_pages=2, first_layer=1, num_layers=2)
TABLE = (7, 2, 3, 5)


class Ranks:
    """The caches of a worker of so many ranks, and the streams of their devices."""

    def __init__(self, layout: KVLayout, degree: int, *, is_free: bool = True) -> None:
        split = HeadSplit(num_kv_heads=layout.num_kv_heads, degree=degree)
        self.heads = [split.heads(rank) for rank in range(degree)]
        self.layout = layout
        self.caches = tuple(
            KVCache(replace(layout, num_kv_heads=len(heads)), NUM_PAGES) for heads in self.heads
        )
        for cache in self.caches:
            cache.pool.zero_()
        self.copies = [HeldCopies(is_free=is_free) for _ in range(degree)]
        self.pages = DeviceShards(layout, self.caches, self.copies)

    def take(self, whole: KVCache) -> None:
        """Hold what `whole`, which has all heads, holds."""
        for cache, heads in zip(self.caches, self.heads, strict=True):
            cache.pool.copy_(_of_heads(whole, heads))

    def gathered(self, part: FrameRange, table: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        into = torch.zeros(part.num_bytes(self.layout), dtype=torch.uint8)
        self.pages.gather(part, table, into).wait()
        return into.numpy()

    def require(self, whole: KVCache) -> None:
        """Every rank has its heads of what `whole` holds, and replicas have the same."""
        for cache, heads in zip(self.caches, self.heads, strict=True):
            assert torch.equal(cache.pool, _of_heads(whole, heads))


def _of_heads(whole: KVCache, heads: range) -> torch.Tensor:
    segments = whole.pool.view(NUM_PAGES, whole.layout.num_layers, NUM_KV_HEADS, -1)
    return segments[:, :, heads.start : heads.stop].reshape(NUM_PAGES, -1)


def filled(layout: KVLayout, seed: int = 0) -> KVCache:
    """All heads, with small whole numbers, which any dtype holds."""
    cache = KVCache(layout, NUM_PAGES)
    generator = torch.Generator().manual_seed(seed)
    cache.pages.values.copy_(torch.randint(-9, 10, cache.pages.values.shape, generator=generator))
    if cache.pages.scales is not None:
        cache.pages.scales.copy_(torch.rand(cache.pages.scales.shape, generator=generator))
    return cache


@st.composite
def parts(draw: st.DrawFn) -> FrameRange:
    first_page, first_layer = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    return FrameRange(
        first_page=first_page,
        num_pages=draw(st.integers(1, 4 - first_page)),
        first_layer=first_layer,
        num_layers=draw(st.integers(1, 3 - first_layer)),
    )


tables = st.permutations(range(NUM_PAGES)).map(lambda pages: tuple(pages[:4]))


@settings(max_examples=60)
@given(
    part=parts(),
    source_table=tables,
    target_pages=st.permutations(range(NUM_PAGES)),
    degrees=st.sampled_from([(2, 1), (1, 2), (2, 4), (4, 2), (8, 2), (2, 8)]),
    page_size=st.sampled_from([16, 32, 64]),
    dtypes=st.sampled_from(
        [("float32", "float32"), ("int8", "int8"), ("bfloat16", "float32"), ("float32", "int8")]
    ),
)
def test_unequal_degrees_hand_over_what_host_memory_would(
    part: FrameRange,
    source_table: tuple[int, ...],
    target_pages: list[int],
    degrees: tuple[int, int],
    page_size: int,
    dtypes: tuple[str, str],
) -> None:
    source = replace(LAYOUT, dtype=dtypes[0])
    target = replace(LAYOUT, dtype=dtypes[1], page_size=page_size)
    whole, expected = filled(source), KVCache(target, NUM_PAGES)
    expected.pool.zero_()
    sender, receiver = Ranks(source, degrees[0]), Ranks(target, degrees[1])
    sender.take(whole)
    table = tuple(target_pages[: target.num_pages(4 * source.page_size)])

    payload = sender.gathered(part, source_table)
    in_host_memory = KVShards(source, sender.caches)
    assert payload.tobytes() == b"".join(in_host_memory.runs(part, source_table))
    KVScatter(expected).write(payload, part, source, table)
    receiver.pages.write(payload, part, source, table)
    receiver.require(expected)


def test_pages_of_one_layout_are_copied_and_never_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One copy a page and rank, though its layers lie apart in the payload."""
    sizes: list[tuple[int, int]] = []

    def copy_rows(copies: HeldCopies, into: torch.Tensor, source: torch.Tensor) -> None:
        sizes.append((into.shape[0], into.shape[1]))
        into.copy_(source)

    monkeypatch.setattr(HeldCopies, "copy_rows", copy_rows)
    ranks, whole = Ranks(LAYOUT, 2), filled(LAYOUT)
    ranks.take(whole)
    payload = ranks.gathered(PART, TABLE)
    assert sizes == [(2, LAYOUT.layer_bytes // 2)] * 4
    ranks.pages.write(payload, PART, LAYOUT, TABLE)
    assert len(sizes) == 8
    ranks.require(whole)


def test_a_part_is_there_when_every_device_has_copied_its_heads() -> None:
    ranks = Ranks(LAYOUT, 2, is_free=False)
    ranks.take(filled(LAYOUT))
    into = torch.zeros(PART.num_bytes(LAYOUT), dtype=torch.uint8)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(ranks.pages.gather(PART, TABLE, into).wait)
        ranks.copies[1].release()
        assert not waiting.done()
        ranks.copies[0].release()
        waiting.result(timeout=60)
    assert into.numpy().tobytes() == b"".join(KVShards(LAYOUT, ranks.caches).runs(PART, TABLE))


def test_every_device_waits_for_what_rank_0_reports_as_computed() -> None:
    ranks, computed = Ranks(LAYOUT, 2, is_free=False), HeldCompletion()
    into = torch.zeros(PART.num_bytes(LAYOUT), dtype=torch.uint8)
    ranks.pages.gather(PART, TABLE, into, after=computed)
    for copies in ranks.copies:
        with pytest.raises(AssertionError, match="before what it waits for"):
            copies.release()


def test_a_write_returns_when_every_device_has_the_pages() -> None:
    ranks, whole = Ranks(LAYOUT, 2, is_free=False), filled(LAYOUT)
    sender = Ranks(LAYOUT, 1)
    sender.take(whole)
    payload = sender.gathered(PART, TABLE)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(ranks.pages.write, payload, PART, LAYOUT, TABLE)
        for copies in ranks.copies:  # both were told, and neither waits for the other
            copies.await_held(1)
        ranks.copies[0].release()
        assert not writing.done()
        ranks.copies[1].release()
        writing.result(timeout=60)
    assert b"".join(KVShards(LAYOUT, ranks.caches).runs(PART, TABLE)) == payload.tobytes()


def test_heads_that_cannot_be_split_evenly_are_refused() -> None:
    caches = tuple(KVCache(LAYOUT, NUM_PAGES) for _ in range(3))
    with pytest.raises(LayoutError, match="degree is 3, num_kv_heads 4"):
        DeviceShards(LAYOUT, caches, [HeldCopies() for _ in caches])
