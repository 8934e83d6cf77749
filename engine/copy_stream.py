"""The seam between frames and the memory of a device: copies beside the steps of a model.

Who begins a copy goes on at once and is given a Completion. Nothing else tells that a copy has
ended: until then its memory belongs to it at both ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pagewire.kv_transfer.device_memory import DeviceMemory


class Completion(Protocol):
    """The end of everything that a device had been told to do when this was made."""

    def wait(self) -> None:
        """Keep this thread until then, and no other."""

    def hold_back(self) -> None:
        """Let what this thread tells the device from here on, in its stream, begin only then.

        The thread itself goes on.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllOf:
    """Implements Completion: the last of several, of one device or of many."""

    parts: tuple[Completion, ...]

    def wait(self) -> None:
        for part in self.parts:
            part.wait()

    def hold_back(self) -> None:
        for part in self.parts:
            part.hold_back()


class CopyStream(Protocol):
    """Copies between one device and the host, in the order in which they were begun."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] that the device can copy from and to while the host goes on.

        Dear to make, so once, at the start.
        """

    def device_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the device. As dear as memory of the host."""

    def lend(self, data: Tensor) -> DeviceMemory:
        """`data`, contiguous bytes on the device, as what moves them from device to device."""

    def copy_rows(self, into: Tensor, source: Tensor) -> None:
        """Told to the device by the work of `begin`: copy rows, which may lie apart on each side.

        into, source: uint8 [num_rows, num_bytes], in memory of the device or of its host.
        """

    def prepare_checksums(self) -> None:
        """Compile what makes them, so that no frame waits for that."""

    def begin_checksum(self, data: Tensor, total: Tensor) -> None:
        """Told to the device by the work of `begin`: the sum that a checksum is made of.

        data: uint8 [num_bytes], a multiple of 8; total: int64 [1]; both on the device.
        """

    def mark(self) -> Completion:
        """Of what this thread has told the device so far, in its stream: of the steps it ran."""

    def begin(self, work: Callable[[], None], *, after: Completion | None = None) -> Completion:
        """Tell the device what `work` tells it, behind earlier work of this stream and `after`.

        Neither steps wait for it, nor it for steps that were begun after `after`.
        """
