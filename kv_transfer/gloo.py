"""Messages over gloo, torch.distributed's library for host memory: it needs no special hardware."""

from typing import TYPE_CHECKING

from pagewire.kv_transfer.group_transport import GroupTransport

if TYPE_CHECKING:
    from pagewire.kv_transfer.gloo_device import GlooDevice


class GlooTransport(GroupTransport):
    """A GroupTransport between host memories."""

    kind = "gloo"

    def _open_device(self) -> "GlooDevice":
        from pagewire.kv_transfer.gloo_device import GlooDevice

        return GlooDevice(self._host)
