"""Checksums of buffers in the memory of a device, which makes them beside its steps."""

from functools import partial

import torch
from torch import Tensor

from pagewire.engine.copy_stream import Completion, CopyStream
from pagewire.kv_transfer.checksum import checksum_of_sum

_SUM_BYTES = 8


class DeviceChecksums:
    """One for each of several buffers. What belongs to a buffer is left alone until it is done."""

    def __init__(self, copies: CopyStream, num_buffers: int) -> None:
        self._copies = copies
        copies.prepare_checksums()
        # int64 [num_buffers]
        self._sums = copies.device_memory(num_buffers * _SUM_BYTES).view(torch.int64)
        self._read = copies.host_memory(num_buffers * _SUM_BYTES).view(torch.int64)

    def begin(self, buffer: int, data: Tensor) -> Completion:
        """Begin with that of `data`, behind all that the device was told in its copy stream.

        data: uint8 [num_bytes], on the device, in the buffer of this number.
        """
        return self._copies.begin(partial(self._sum, buffer, data))

    def value(self, buffer: int, num_bytes: int) -> int:
        """The checksum of what was begun with last, which has so many bytes, once it is done."""
        return checksum_of_sum(int(self._read[buffer]), num_bytes)

    def _sum(self, buffer: int, data: Tensor) -> None:
        place = slice(buffer, buffer + 1)
        self._copies.begin_checksum(data, self._sums[place])
        self._read[place].copy_(self._sums[place], non_blocking=True)
