"""Frames from the pages of two ranks to those of four, through staging slots."""

from dataclasses import replace

import torch

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_shards import KVShards
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, HandoffId
from pagewire.worker.sharded_frames import ShardedFrameReader, ShardedFrameWriter

LAYOUT = KVLayout(page_size=16, num_layers=2, num_kv_heads=4, head_dim=8, dtype="float32")
FRAME = Frame(
    id=HandoffId(request_id="r", attempt=1, sender=bytes(16), receiver=bytes(16)),
    seq=0,
    slot=1,
    slot_generation=1,
    first_page=0,
    num_pages=2,
    first_layer=0,
    num_layers=2,
    layout_digest=LAYOUT.digest(),
    prefix_hash=bytes(16),
    checksum=0,
)
NUM_BYTES = 2 * LAYOUT.page_bytes


def ranks(degree: int) -> tuple[KVCache, ...]:
    layout = replace(LAYOUT, num_kv_heads=LAYOUT.num_kv_heads // degree)
    caches = tuple(KVCache(layout, 4) for _ in range(degree))
    for cache in caches:
        cache.pool.zero_()
    return caches


def heads(caches: tuple[KVCache, ...], page: int) -> torch.Tensor:
    """The values of a page with the heads of all ranks side by side."""
    return torch.cat([cache.pages.values[page] for cache in caches], dim=1)


def test_a_frame_arrives_on_every_rank_or_on_none() -> None:
    senders, receivers = ranks(2), ranks(4)
    for rank, cache in enumerate(senders):
        cache.pages.values.copy_(
            torch.arange(cache.pages.values.numel()).view_as(cache.pages.values) + rank * 1e6
        )
    frame, payload = ShardedFrameReader(KVShards(LAYOUT, senders)).read(FRAME, (3, 1))
    writer = ShardedFrameWriter(KVShards(LAYOUT, receivers), num_slots=2, slot_bytes=NUM_BYTES)
    slot = writer.slot(frame.slot, NUM_BYTES)
    slot[:] = b"".join(payload)

    slot[100] ^= 1
    assert not writer.write(frame, LAYOUT, (0, 2))
    assert not any(cache.pool.any() for cache in receivers)

    slot[100] ^= 1
    assert writer.write(frame, LAYOUT, (0, 2))
    assert torch.equal(heads(receivers, 0), heads(senders, 3))
    assert torch.equal(heads(receivers, 2), heads(senders, 1))
    assert not any(cache.pool[page].any() for cache in receivers for page in (1, 3))
