"""Payloads in the memory of a GPU, which the host neither reads nor writes.

A pair whose pages are on GPUs at both ends may have a transport that moves them from one to the
other. Whoever has such a payload makes its checksum there, too.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from pagewire.kv_transfer.landing import Landing


class DeviceMemory(Protocol):
    """Contiguous bytes, as a uint8 tensor on a GPU has them."""

    @property
    def nbytes(self) -> int: ...

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """Numba's description of such memory, which UCX's bindings and torch share."""


class DeviceSender(Protocol):
    """The part of a Connection that only pairs with GPUs at both ends have."""

    async def send_from_device(self, header: bytes, payload: DeviceMemory) -> None:
        """Send one message whose payload lands in a DeviceLanding, as `Connection.send` does.

        All that writes the payload must have ended: nothing waits for the device here.
        """


def settle_gpu(device: str) -> None:
    """Return when the GPU, as torch names it, has made every copy that this process told it of."""
    import torch  # slow, and of no use to those without a GPU

    torch.cuda.synchronize(device)


class DeviceLanding(Landing):
    """Where one payload lands on a GPU. It has no piece that the host could fill."""

    def __init__(self, memory: DeviceMemory) -> None:
        super().__init__()
        self.memory = memory
        self.num_bytes = memory.nbytes
