"""Frames from the pages of two ranks to those of four, through staging slots."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_shards import KVShards
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, HandoffId
from pagewire.worker.sharded_frames import ShardedFrameReader
from pagewire.worker.slot_frames import SlotFrameWriter
from pagewire.worker.slot_memory import HostSlots

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


@pytest.mark.parametrize("lands_in_pages", [False, True])
def test_a_frame_arrives_on_every_rank_or_on_none(lands_in_pages: bool) -> None:
    senders, receivers = ranks(2), ranks(4)
    for rank, cache in enumerate(senders):
        cache.pages.values.copy_(
            torch.arange(cache.pages.values.numel()).view_as(cache.pages.values) + rank * 1e6
        )
    frame, payload = ShardedFrameReader(KVShards(LAYOUT, senders)).read(FRAME, (3, 1))
    slots = np.zeros((2, NUM_BYTES), dtype=np.uint8)
    writer = SlotFrameWriter(KVShards(LAYOUT, receivers), HostSlots(slots))

    def arrives(payload: bytes) -> bool:
        if not lands_in_pages:
            writer.land_in_slot(frame, NUM_BYTES).write(memoryview(payload))
            assert writer.has_checksum(frame)
            return writer.write(frame, LAYOUT, (0, 2))
        writer.land_in_pages(frame, (0, 2)).write(memoryview(payload))
        assert not writer.has_checksum(frame)  # bringing it into pages takes time
        return writer.is_sound(frame)

    sent = b"".join(payload)
    assert not arrives(sent[:100] + bytes([sent[100] ^ 1]) + sent[101:])
    assert not any(cache.pool.any() for cache in receivers)

    assert arrives(sent)
    assert torch.equal(heads(receivers, 0), heads(senders, 3))
    assert torch.equal(heads(receivers, 2), heads(senders, 1))
    assert not any(cache.pool[page].any() for cache in receivers for page in (1, 3))
