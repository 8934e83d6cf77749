"""A prefill worker under virtual time."""

from pagewire.kv_transfer.messages import Frame
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.sim.worker import SimWorker
from pagewire.worker.effects import Scatter, Verify
from pagewire.worker.interval import Interval


class SimPrefillWorker(SimWorker[PrefillCore]):
    """Sends frames; takes none."""

    role = pb.ROLE_PREFILL

    def registration_info(self) -> pb.RegisterRequest:
        info = super().registration_info()
        info.max_parked_pages = self.core.max_parked_pages
        return info

    def place(self, peer: bytes, header: bytes, length: int) -> int | None:
        raise AssertionError("a prefill worker takes no frames")

    def land(self, slot: int, payload: bytes) -> None:
        raise AssertionError("a prefill worker takes no frames")

    def _scatter(self, effect: Scatter) -> None:
        raise AssertionError("a prefill worker takes no frames")

    def _on_layers_done(self, num_layers: int) -> None:
        self.carry_out(self.core.on_layers_done(num_layers, self.process.now))

    def _verify(self, effect: Verify) -> None:
        raise AssertionError("a prefill worker takes no frames")

    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        self.carry_out(self.core.on_frame_sent(frame, checksum, self.process.now, gathered))
