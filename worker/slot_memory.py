"""Staging slots, into which frames land: in host memory, or in that of a device."""

from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagewire.engine.copy_stream import CopyStream
from pagewire.kv_transfer.device_memory import DeviceLanding
from pagewire.kv_transfer.landing import CheckedLanding, Landing
from pagewire.worker.device_checksums import DeviceChecksums

Bytes = npt.NDArray[np.uint8]
DataT = TypeVar("DataT", covariant=True)


class SlotMemory(Protocol[DataT]):
    """The slots of a worker. What is said of one is said of the payload that landed there last."""

    def land(self, slot: int, num_bytes: int) -> Landing:
        """Where the next payload of the slot lands."""

    def has_checksum(self, slot: int) -> bool:
        """Whether the checksum was made while the payload landed: it then takes no time."""

    def checksum(self, slot: int) -> int:
        """Of the payload, as the memory's senders make it."""

    def data(self, slot: int) -> DataT:
        """The payload, uint8 [num_bytes]."""


class HostSlots:
    """Implements SlotMemory for payloads that any transport brings."""

    def __init__(self, slots: Bytes) -> None:
        """slots: [number of slots, bytes of a slot]."""
        self._slots = slots
        self._landings: dict[int, CheckedLanding] = {}

    def land(self, slot: int, num_bytes: int) -> Landing:
        landing = CheckedLanding(self._slots[slot, :num_bytes].data)
        self._landings[slot] = landing
        return landing

    def has_checksum(self, slot: int) -> bool:
        return self._landings[slot].is_full

    def checksum(self, slot: int) -> int:
        return self._landings[slot].checksum()

    def data(self, slot: int) -> Bytes:
        return self._slots[slot, : self._landings[slot].num_bytes]


class DeviceSlots:
    """Implements SlotMemory for payloads that come from the memory of another device."""

    def __init__(self, copies: CopyStream, *, num_slots: int, slot_bytes: int) -> None:
        memory = copies.device_memory(num_slots * slot_bytes)
        self._slots = memory.view(num_slots, slot_bytes)
        self._copies = copies
        self._checksums = DeviceChecksums(copies, num_slots)
        self._num_bytes: dict[int, int] = {}

    def land(self, slot: int, num_bytes: int) -> Landing:
        self._num_bytes[slot] = num_bytes
        return DeviceLanding(self._copies.lend(self.data(slot)))

    def has_checksum(self, slot: int) -> bool:
        return False

    def checksum(self, slot: int) -> int:
        data = self.data(slot)
        self._checksums.begin(slot, data).wait()
        return self._checksums.value(slot, len(data))

    def data(self, slot: int) -> Tensor:
        return self._slots[slot, : self._num_bytes[slot]]
