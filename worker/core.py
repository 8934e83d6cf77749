"""What the shell needs of a worker's pure core; prefill and decode workers each have one."""

from collections.abc import Collection, Iterable
from typing import Protocol

from pagewire.engine.batch import Batch, StepResult
from pagewire.kv_transfer.messages import Message
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Effect


class WorkerCore(Protocol):
    """(state, event, now) → effects. `now` is seconds on the shell's clock."""

    incarnation: bytes

    def on_command(self, command: pb.WorkerCommand, now: float) -> list[Effect]:
        """A command of a router."""

    def on_session_lost(self, router: bytes) -> list[Effect]:
        """A router is gone."""

    def on_message(self, peer: bytes, message: Message, now: float) -> list[Effect]:
        """A message of another worker is complete."""

    def on_peer_lost(self, peer: bytes, now: float) -> list[Effect]:
        """The connection to another worker is gone."""

    def next_batch(self, now: float) -> tuple[Batch | None, list[Effect]]:
        """What the model runs next; None when there is nothing to do."""

    def next_batch_ahead(self, now: float) -> Batch | None:
        """What the model runs behind the batch that is out, whose tokens are not known; or None."""

    def drop_batch_ahead(self) -> None:
        """The batch that `next_batch_ahead` gave is void: it does not run, or not any more."""

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        """The step has run; of two that are out, the one that was scheduled first."""

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        """The step raised because of `rows`, by index. They fail, the others run again."""

    def tick(self, now: float) -> list[Effect]:
        """Time passes; called a few times a second."""

    def report_cache(self, routers: Iterable[bytes]) -> list[Effect]:
        """Tell the routers, all that have a session, what has changed in the prefix cache."""

    def state(self) -> pb.WorkerState:
        """Counts as of now; cheap."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left of any attempt."""

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pages and slots add up; looks at each of them."""
