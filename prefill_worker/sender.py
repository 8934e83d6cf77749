"""The sending end of one hand-off: a pure state machine.

    state      event                         → state      sends
    QUEUED     open                            STREAMING  Open
    STREAMING  Accepted, computed, Grant       STREAMING  a Frame for each (range, slot) pair
    STREAMING  finished, all frames sent       SEALED     Seal
    SEALED     Committed                       RELEASED
    QUEUED     close                           RELEASED
    STREAMING  close, no send in flight        RELEASED   Closed
    STREAMING  close, sends in flight          DRAINING
    DRAINING   last send ended                 RELEASED   Closed
    SEALED     close                           RELEASED   Closed
    any        peer lost                       RELEASED

A send that fails is followed by the loss of the peer: nothing is sealed in between. Whatever does
not fit the state is a repetition or a late message and changes nothing; docs/PROTOCOL.md has every
pair.
"""

from collections import deque
from enum import Enum, auto

from pagewire.kv_transfer.checksum import digest_of
from pagewire.kv_transfer.layout import FrameRange, KVLayout, plan_frames
from pagewire.kv_transfer.messages import (
    MAX_AGE_S,
    Closed,
    Frame,
    Grant,
    HandoffId,
    Message,
    Open,
    Seal,
)
from pagewire.prefill_worker.exposed_time import ExposedTime
from pagewire.worker.interval import Interval


class SenderState(Enum):
    QUEUED = auto()
    STREAMING = auto()
    SEALED = auto()
    DRAINING = auto()
    RELEASED = auto()


class Sender:
    """Cuts computed pages that the peer lacks into frames and sends them as credit allows.

    The methods return the messages to send, in order. A Frame among them is to be sent with its
    pages; `on_sent` says that this has happened, and with which checksum.
    """

    def __init__(
        self,
        *,
        id: HandoffId,
        ticket: bytes,
        prefix_hash: bytes,
        num_prompt_tokens: int,
        layout: KVLayout,
        slot_bytes: int,
    ) -> None:
        self.id = id
        self.state = SenderState.QUEUED
        self.exposed = ExposedTime()  # complete when the hand-off is sealed
        self._ticket = ticket
        self._prefix_hash = prefix_hash
        self._num_prompt_tokens = num_prompt_tokens
        self._layout = layout
        self._layout_digest = layout.digest()
        self._slot_bytes = slot_bytes
        self._is_accepted = False
        self._num_computed_pages = 0
        self._num_computed_layers = 0  # of all pages, those that are not complete included
        self._num_planned_pages = 0  # cut into frames, or not needed by the peer
        self._num_planned_layers = 0  # the same of the pages behind these
        self._ready: deque[FrameRange] = deque()  # computed, not sent
        self._grants: deque[Grant] = deque()  # credit, not used
        self._seen_grants: set[tuple[int, int]] = set()
        self._num_frames = 0
        self._num_sending = 0
        self._checksums: dict[int, int] = {}  # by seq
        self._unacked: set[int] = set()  # seqs of frames that the peer has not answered
        self._progress_at = 0.0  # when a message of the hand-off last went or came
        self._first_tokens: tuple[int, ...] = ()
        self._first_logprobs: tuple[bytes, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether the peer knows of the hand-off and has not been told of its end."""
        return self.state in (SenderState.STREAMING, SenderState.SEALED, SenderState.DRAINING)

    @property
    def is_accepted(self) -> bool:
        """Whether the peer has room for the prompt."""
        return self._is_accepted

    def open(self, now: float, *, age_s: float = 0.0) -> list[Message]:
        """The first chunk is scheduled: ask the decode worker for a Reservation.

        `age_s` is for how long the router has had the request.
        """
        if self.state is not SenderState.QUEUED:
            return []
        self.state = SenderState.STREAMING
        self._progress_at = now
        return [
            Open(
                id=self.id,
                ticket=self._ticket,
                num_prompt_tokens=self._num_prompt_tokens,
                layout=self._layout,
                prefix_hash=self._prefix_hash,
                age_ms=int(1000 * min(age_s, MAX_AGE_S)),
            )
        ]

    def on_computed(self, num_tokens: int, now: float) -> list[Message]:
        """The KV of the first `num_tokens` prompt tokens lies in pages."""
        if self.state is not SenderState.STREAMING:
            return []
        complete = num_tokens >= self._num_prompt_tokens
        self._num_computed_pages = (
            self._layout.num_pages(num_tokens) if complete else num_tokens // self._layout.page_size
        )
        return self._pair_frames_with_credit(now)

    def on_layers_computed(self, num_layers: int, now: float) -> list[Message]:
        """The KV of the whole prompt lies in pages, in the first `num_layers` layers.

        The prompt's last chunk is being computed; those before it are complete.
        """
        if self.state is not SenderState.STREAMING:
            return []
        self._num_computed_layers = num_layers
        return self._pair_frames_with_credit(now)

    def can_accept(self, num_hit_pages: int) -> bool:
        """Whether the prompt has so many pages."""
        return num_hit_pages <= self._layout.num_pages(self._num_prompt_tokens)

    def on_accepted(self, num_hit_pages: int, now: float) -> list[Message]:
        """The peer has room, and the first pages of the prompt already."""
        if self.state is not SenderState.STREAMING or self._is_accepted:
            return []
        self._is_accepted = True
        self._progress_at = now
        self._num_planned_pages = num_hit_pages
        return [*self._pair_frames_with_credit(now), *self._seal_if_complete(now)]

    def finish(
        self,
        first_tokens: tuple[int, ...],
        now: float,
        first_logprobs: tuple[bytes, ...] = (),
    ) -> list[Message]:
        """Every page is computed and token 0 of each choice is sampled.

        Seal as soon as the last frame is out.
        """
        if self.state is not SenderState.STREAMING:
            return []
        self._first_tokens = first_tokens
        self._first_logprobs = first_logprobs
        self.exposed.begin(now)
        return self._seal_if_complete(now)

    def on_grant(self, grant: Grant, now: float) -> list[Message]:
        credit = (grant.slot, grant.slot_generation)
        if self.state is not SenderState.STREAMING or credit in self._seen_grants:
            return []
        self._seen_grants.add(credit)
        self._grants.append(grant)
        self._progress_at = now
        return self._pair_frames_with_credit(now)

    def on_sent(
        self, seq: int, checksum: int | None, now: float, gathered: Interval | None = None
    ) -> list[Message]:
        """The pages of frame `seq` are not read any more; without a checksum it was not sent.

        `gathered` is when its checksum was made, where that is known.
        """
        self.exposed.sent(now, gathered)
        self._num_sending -= 1
        self._progress_at = now
        if checksum is not None:
            self._checksums[seq] = checksum
        if self.state is SenderState.DRAINING and not self._num_sending:
            return self._release()
        return self._seal_if_complete(now)

    def on_ack(self, seq: int, now: float) -> None:
        if seq in self._unacked:
            self._unacked.remove(seq)
            self._progress_at = now

    def on_renew(self, now: float) -> None:
        """The peer waits, for room or for frames. An answer that it owes is still to come."""
        if self.state is SenderState.STREAMING and not self._unacked:
            self._progress_at = now

    def forgive(self, seconds: float, now: float) -> None:
        """This process stood still for so long: what the peer has sent may wait to be read."""
        self._progress_at = min(self._progress_at + seconds, now)

    def on_committed(self) -> None:
        if self.state is SenderState.SEALED:
            self.state = SenderState.RELEASED

    def close(self) -> list[Message]:
        """Give the hand-off up. Idempotent."""
        match self.state:
            case SenderState.QUEUED:
                self.state = SenderState.RELEASED
            case SenderState.STREAMING if self._num_sending:
                self.state = SenderState.DRAINING
            case SenderState.STREAMING | SenderState.SEALED:
                return self._release()
            case SenderState.DRAINING | SenderState.RELEASED:
                pass
        return []

    def on_peer_lost(self) -> None:
        self.state = SenderState.RELEASED

    def is_stalled(self, now: float, *, answer_s: float, send_s: float) -> bool:
        """Whether nothing has moved for too long.

        `send_s` bounds a send under way, which a slow link may need; `answer_s` the silence of the
        peer, which says so several times in it when it merely waits.
        """
        if self._num_sending:
            limit = send_s
        elif self.state in (SenderState.STREAMING, SenderState.SEALED):
            limit = answer_s
        else:
            return False
        return self.state is not SenderState.RELEASED and now - self._progress_at > limit

    def _pair_frames_with_credit(self, now: float) -> list[Message]:
        if self._is_accepted:
            self._plan_frames()
        frames: list[Message] = []
        while self._ready and self._grants:
            frames.append(self._frame(self._ready.popleft(), self._grants.popleft(), now))
        return frames

    def _plan_frames(self) -> None:
        """Cut what is computed into frames: complete pages, then complete layers of the others.

        A step that failed may have reported layers of a last chunk that is cut again, smaller. What
        was planned therefore stays planned, whatever is computed after it.
        """
        end = self._num_computed_pages
        if self._num_planned_pages < end:
            self._plan(end, self._layout.num_layers)
            self._num_planned_pages = end
        if self._num_planned_layers < self._num_computed_layers:
            self._plan(self._layout.num_pages(self._num_prompt_tokens), self._num_computed_layers)
            self._num_planned_layers = self._num_computed_layers

    def _plan(self, end_page: int, end_layer: int) -> None:
        first_page, layers = self._num_planned_pages, range(self._num_planned_layers, end_layer)
        self._ready.extend(
            plan_frames(self._layout, first_page, end_page, self._slot_bytes, layers)
        )

    def _frame(self, part: FrameRange, grant: Grant, now: float) -> Frame:
        if not self._num_sending:
            self.exposed.waited(now)
        seq = self._num_frames
        self._num_frames += 1
        self._num_sending += 1
        self._unacked.add(seq)
        self._progress_at = now
        return Frame(
            id=self.id,
            seq=seq,
            slot=grant.slot,
            slot_generation=grant.slot_generation,
            first_page=part.first_page,
            num_pages=part.num_pages,
            first_layer=part.first_layer,
            num_layers=part.num_layers,
            layout_digest=self._layout_digest,
            prefix_hash=self._prefix_hash,
            checksum=0,
        )

    def _seal_if_complete(self, now: float) -> list[Message]:
        if (
            self.state is not SenderState.STREAMING
            or not self._first_tokens
            or not self._is_accepted
            or self._ready
            or self._num_sending
            or len(self._checksums) < self._num_frames
        ):
            return []
        self.state = SenderState.SEALED
        self.exposed.waited(now)
        self._progress_at = now
        return [
            Seal(
                id=self.id,
                num_frames=self._num_frames,
                digest=digest_of(self._checksums[seq] for seq in range(self._num_frames)),
                first_tokens=self._first_tokens,
                first_logprobs=self._first_logprobs,
            )
        ]

    def _release(self) -> list[Message]:
        self.state = SenderState.RELEASED
        return [Closed(id=self.id)]
