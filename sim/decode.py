"""A decode worker under virtual time."""

from collections.abc import Sequence

from pagewire.decode_worker.core import DecodeCore
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.messages import Frame, decode
from pagewire.proto import worker_pb2 as pb
from pagewire.sim.kv_memory import LAYOUT
from pagewire.sim.process import Process
from pagewire.sim.registration import RegistrationDesk
from pagewire.sim.transport import Fabric
from pagewire.sim.worker import SimWorker
from pagewire.worker.effects import Scatter
from pagewire.worker.interval import Interval


class SimDecodeWorker(SimWorker[DecodeCore]):
    """Receives frames into staging slots, which keep their bytes until the next frame lands."""

    role = pb.ROLE_DECODE

    def __init__(
        self,
        *,
        process: Process,
        core: DecodeCore,
        max_model_len: int,
        fabric: Fabric,
        routers: Sequence[RegistrationDesk],
    ) -> None:
        super().__init__(
            process=process,
            core=core,
            max_model_len=max_model_len,
            fabric=fabric,
            routers=routers,
        )
        self._slots: dict[int, bytes] = {}

    def place(self, peer: bytes, header: bytes, length: int) -> int | None:
        frame = decode(header)
        assert isinstance(frame, Frame), "only frames have a payload"
        slot, effects = self.core.place(peer, frame, length)
        self.carry_out(effects)
        return slot

    def land(self, slot: int, payload: bytes) -> None:
        self._slots[slot] = payload

    def _scatter(self, effect: Scatter) -> None:
        frame = effect.frame
        payload = self._slots[frame.slot]
        is_sound = checksum(payload) == frame.checksum
        if is_sound:
            assert effect.source == LAYOUT, "simulated workers have one layout"
            self.memory.scatter(frame.part, effect.page_table, payload)
        self.carry_out(self.core.on_scattered(frame, is_sound, self.process.now))

    def _on_layers_done(self, num_layers: int) -> None:
        raise AssertionError("nobody asks a decode step for its layers")

    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        raise AssertionError("a decode worker sends no frames")
