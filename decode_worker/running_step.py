"""A decode step that is out: the model runs it, or has it behind the step that it runs. Pure."""

from dataclasses import dataclass

from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.orphans import OrphanedPages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningStep:
    """What was scheduled for one step."""

    sequences: list[DecodeSequence]  # one for each row of its batch
    began: float  # seconds on the worker's clock
    orphans: OrphanedPages  # of those of its sequences that have ended since

    def first_times(self, request: DecodeRequest, now: float) -> pb.TimeParts | None:
        """Of this step, which ends now, when it is the first of a request; None after that."""
        if request.queued_at is None:
            return None
        queue_s, request.queued_at = self.began - request.queued_at, None
        return pb.TimeParts(decode_queue_s=queue_s, decode_s=now - self.began)
