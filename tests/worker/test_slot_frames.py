"""Frames that land in the memory of a device: verified there, and only then in pages."""

from dataclasses import replace

import pytest
import torch
from fake_device import FakeDeviceMemory, page_sum
from handoff_pair import DECODE, LAYOUT, PREFILL
from held_copies import HeldCopies
from torch import Tensor

from pagewire.engine.device_pages import DevicePages
from pagewire.engine.kv_cache import KVCache
from pagewire.kv_transfer.checksum import checksum, checksum_of_sum
from pagewire.kv_transfer.device_memory import DeviceLanding
from pagewire.kv_transfer.messages import Frame, HandoffId
from pagewire.worker.frames import PageWriter
from pagewire.worker.slot_frames import FrameWriterByPeer, SlotFrameWriter
from pagewire.worker.slot_memory import DeviceSlots, HostSlots

NUM_BYTES = LAYOUT.page_bytes
NUM_SLOTS = 2
SLOT = 1
TABLE = (3,)
HOST_PEER = b"h" * 16
FRAME = Frame(
    id=HandoffId(request_id="request", attempt=1, sender=PREFILL, receiver=DECODE),
    seq=0,
    slot=SLOT,
    slot_generation=0,
    first_page=0,
    num_pages=1,
    first_layer=0,
    num_layers=LAYOUT.num_layers,
    layout_digest=LAYOUT.digest(),
    prefix_hash=bytes(16),
    checksum=0,
)


class RecordedCopies(HeldCopies):
    """Knows its memory, so that a test can do what a transport does."""

    def __init__(self) -> None:
        super().__init__(is_free=True)
        self.lent: list[Tensor] = []

    def lend(self, data: Tensor) -> FakeDeviceMemory:
        self.lent.append(data)
        return super().lend(data)


class Stage:
    def __init__(self) -> None:
        self.cache = KVCache(LAYOUT, 4)
        self.cache.pool.zero_()
        self.copies = RecordedCopies()
        pages = DevicePages(self.cache, self.copies)
        slots = self.copies.host_memory(NUM_SLOTS * NUM_BYTES).view(NUM_SLOTS, NUM_BYTES)
        on_device = DeviceSlots(self.copies, num_slots=NUM_SLOTS, slot_bytes=NUM_BYTES)
        self.writer: PageWriter = FrameWriterByPeer(
            host=SlotFrameWriter(pages, HostSlots(slots.numpy())),
            device=SlotFrameWriter(pages, on_device),
            is_direct={PREFILL}.__contains__,
        )

    def arrive(self, frame: Frame, payload: Tensor, *, in_pages: bool) -> None:
        if in_pages:
            landing = self.writer.land_in_pages(frame, TABLE)
        else:
            landing = self.writer.land_in_slot(frame, NUM_BYTES)
        assert isinstance(landing, DeviceLanding) and landing.num_bytes == NUM_BYTES
        self.copies.lent[-1].copy_(payload)
        assert not self.writer.has_checksum(frame)  # the event loop must not wait for the device

    def is_taken(self, frame: Frame, *, in_pages: bool) -> bool:
        return self.writer.is_sound(frame) if in_pages else self.writer.write(frame, LAYOUT, TABLE)


def payload() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (NUM_BYTES,), dtype=torch.uint8, generator=generator)


def with_checksum(data: Tensor) -> Frame:
    total = page_sum(data.numpy().view("uint64"))
    return replace(FRAME, checksum=checksum_of_sum(total, NUM_BYTES))


@pytest.mark.parametrize("in_pages", [False, True])
def test_a_sound_frame_gets_into_its_pages(in_pages: bool) -> None:
    stage, data = Stage(), payload()
    frame = with_checksum(data)
    stage.arrive(frame, data, in_pages=in_pages)
    assert not stage.cache.pool.any()
    assert stage.is_taken(frame, in_pages=in_pages)
    assert torch.equal(stage.cache.pool[TABLE[0]], data)


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("bit", [0, 777, NUM_BYTES * 8 - 1])
def test_a_frame_that_was_changed_does_not(bit: int, in_pages: bool) -> None:
    stage, data = Stage(), payload()
    frame = with_checksum(data)
    data[bit // 8] ^= 1 << bit % 8
    stage.arrive(frame, data, in_pages=in_pages)
    assert not stage.is_taken(frame, in_pages=in_pages)
    assert not stage.cache.pool.any()


def test_a_frame_with_the_checksum_of_the_other_kind_does_not() -> None:
    stage, data = Stage(), payload()
    frame = replace(FRAME, checksum=checksum(data.numpy().data))
    stage.arrive(frame, data, in_pages=True)
    assert not stage.is_taken(frame, in_pages=True)
    assert not stage.cache.pool.any()


def test_a_slot_takes_frames_of_both_kinds_of_peers() -> None:
    stage, data = Stage(), payload()
    frame = with_checksum(data)
    stage.arrive(frame, data, in_pages=True)
    assert stage.is_taken(frame, in_pages=True)

    data = data.flip(0)
    sender = replace(FRAME.id, sender=HOST_PEER)
    frame = replace(FRAME, id=sender, checksum=checksum(data.numpy().data))
    landing = stage.writer.land_in_pages(frame, TABLE)
    landing.write(data.numpy().data)
    assert stage.writer.is_sound(frame)
    assert torch.equal(stage.cache.pool[TABLE[0]], data)
