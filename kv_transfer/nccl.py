"""Messages over NCCL, torch.distributed's library for GPU memory: for static pairs of workers.

Limits: one request cannot be cancelled, its pair is torn down and connects again; NCCL opens ports
without authentication or encryption, so the network must be your own.
"""

from typing import TYPE_CHECKING

from pagewire.kv_transfer.group_transport import GroupTransport
from pagewire.kv_transfer.transport import Handler, TransportError

if TYPE_CHECKING:
    from pagewire.kv_transfer.nccl_device import NcclDevice


def require_gpu(device: str) -> None:
    """Raise TransportError, with a remedy, unless `device`, as torch names it, is a GPU."""
    if device.partition(":")[0] != "cuda":
        raise TransportError(
            f"transport nccl moves GPU memory, and workers run on {device}; use shm, ucx or tcp"
        )


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
