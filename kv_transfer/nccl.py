"""Messages over NCCL, torch.distributed's library for GPU memory: for static pairs of workers.

Limits: one request cannot be cancelled, its pair is torn down and connects again; NCCL opens ports
without authentication or encryption, so the network must be your own.
"""

from typing import TYPE_CHECKING

from pagewire.kv_transfer.group_transport import GroupTransport
from pagewire.kv_transfer.transport import Handler

if TYPE_CHECKING:
    from pagewire.kv_transfer.nccl_device import NcclDevice


class NcclTransport(GroupTransport):
    """A GroupTransport between GPUs. `start` raises TransportError where there is none."""

    kind = "nccl"

    def __init__(self, *, incarnation: bytes, handler: Handler, host: str, device: str) -> None:
        """`device` is the GPU of this worker, such as cuda:0."""
        super().__init__(incarnation=incarnation, handler=handler, host=host)
        self._gpu = device

    def _open_device(self) -> "NcclDevice":
        from pagewire.kv_transfer.nccl_device import NcclDevice

        return NcclDevice(self._host, self._gpu)
