"""A request inside a decode worker: its hand-off, then the sequences of its choices."""

from dataclasses import dataclass, field

from pagewire.decode_worker.receiver import Receiver
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.decode_worker.slots import SlotHolder
from pagewire.engine.page_pool import Reservation
from pagewire.kv_transfer.messages import Frame
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import PageDemand
from pagewire.proto.page_hash import PageKey
from pagewire.worker.identity import AttemptKey


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeRequest:
    """One attempt. Owns the prompt's pages while they arrive; its sequences own them from then on.

    It lasts as long as one of its sequences does.
    """

    key: AttemptKey
    route: pb.Route  # for events to the router that sent the request
    token_ids: tuple[int, ...]  # of the prompt
    max_tokens: int  # that each choice may have behind `token_ids`
    num_choices: int
    receiver: Receiver
    page_keys: tuple[PageKey, ...] = ()  # of the prompt's full pages; empty: nothing is shared
    sequences: list[DecodeSequence] = field(default_factory=list)  # those that have not ended
    # From Open on, or before that an earlier attempt's; the sequences take their parts of it.
    reservation: Reservation | None = None
    waits_since: float = 0.0  # seconds on the worker's clock: by it those that wait for room stand
    held_until: float | None = None  # while the Reservation waits for a hand-off to begin
    pages: list[int] = field(default_factory=list)  # of the prompt, until the hand-off is complete
    renewed_at: float = 0.0  # seconds on the worker's clock, when the sender was told to go on
    sealed_at: float = 0.0  # seconds on the worker's clock, once the Seal was here
    queued_at: float | None = None  # since when it waits for its first step; None: it does not

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def holder(self) -> SlotHolder:
        """What the slots of the hand-off are granted to."""
        return SlotHolder(self.key, self.receiver.id.receiver)

    def pages_of(self, frame: Frame) -> list[int]:
        """The pages that `frame` is written into."""
        return [self.pages[index] for index in self.receiver.pages_of(frame)]

    @property
    def demand(self) -> PageDemand:
        """KV for the longest life that the choices can have, without those that have ended."""
        return PageDemand(
            num_prompt_tokens=self.num_prompt_tokens,
            max_tokens=self.max_tokens,
            n=len(self.sequences),
        )
