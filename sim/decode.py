"""A decode worker under virtual time."""

from collections.abc import Sequence

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.frame_place import FramePlace
from pagewire.kv_transfer.checksum import checksum
from pagewire.kv_transfer.messages import Frame, decode
from pagewire.proto import worker_pb2 as pb
from pagewire.sim.kv_memory import LAYOUT
from pagewire.sim.process import Process
from pagewire.sim.registration import RegistrationDesk
from pagewire.sim.transport import Fabric
from pagewire.sim.worker import SimWorker
from pagewire.worker.effects import Scatter, Verify
from pagewire.worker.interval import Interval


class SimDecodeWorker(SimWorker[DecodeCore]):
    """Receives frames into pages, where they land, or into slots.

    Both get their bytes at the last moment, so that pages freed too early would show.
    """

    role = pb.ROLE_DECODE

    def __init__(
        self,
        *,
        process: Process,
        core: DecodeCore,
        max_model_len: int,
        fabric: Fabric,
        routers: Sequence[RegistrationDesk],
        runs_ahead: bool = False,
    ) -> None:
        super().__init__(
            process=process,
            core=core,
            max_model_len=max_model_len,
            fabric=fabric,
            routers=routers,
            runs_ahead=runs_ahead,
        )
        self._slots: dict[int, bytes] = {}  # what landed last
        self._places: dict[int, tuple[Frame, FramePlace]] = {}  # by slot

    def place(self, peer: bytes, header: bytes, length: int) -> int | None:
        frame = decode(header)
        assert isinstance(frame, Frame), "only frames have a payload"
        place, effects = self.core.place(peer, frame, length)
        self.carry_out(effects)
        if place is None:
            return None
        self._places[place.slot] = frame, place
        return place.slot

    def land(self, slot: int, payload: bytes) -> None:
        self._slots[slot] = payload
        frame, place = self._places[slot]
        if place.page_table is not None:
            self.memory.scatter(frame.part, place.page_table, payload)

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

    def _verify(self, effect: Verify) -> None:
        frame = effect.frame
        is_sound = checksum(self._slots[frame.slot]) == frame.checksum
        self.carry_out(self.core.on_scattered(frame, is_sound, self.process.now))

    def _on_frame_sent(self, frame: Frame, checksum: int | None, gathered: Interval | None) -> None:
        raise AssertionError("a decode worker sends no frames")
