"""The receiving end of one hand-off: a pure state machine.

    state      event                                    → state
    EXPECTED   Open with the right ticket                 WAITING
    WAITING    reserved                                   RECEIVING
    RECEIVING  frame scattered, Seal                      RECEIVING
    RECEIVING  sealed, every frame here, all covered      READY
    not READY  close                                      CLOSED

READY and CLOSED are final. A frame is believed only when its checksum, digest of layout, hash of
prompt and range agree with what was agreed, and never twice. Whatever does not fit the state is a
repetition or a late message and changes nothing; docs/PROTOCOL.md has every pair.
"""

from enum import Enum, auto
from itertools import takewhile

from pagewire.kv_transfer.checksum import digest_of
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, HandoffId, Open, RefuseReason, Seal


class ReceiverState(Enum):
    EXPECTED = auto()
    WAITING = auto()
    RECEIVING = auto()
    READY = auto()
    CLOSED = auto()


class Receiver:
    """Checks what arrives and knows when all of it is there."""

    def __init__(
        self,
        *,
        id: HandoffId,
        ticket: bytes,
        prefix_hash: bytes,
        num_prompt_tokens: int,
        layout: KVLayout,
    ) -> None:
        self.id = id  # as this worker writes it: sender is the decode worker
        self.state = ReceiverState.EXPECTED
        self.seal: Seal | None = None
        self._ticket = ticket
        self._prefix_hash = prefix_hash
        self._num_prompt_tokens = num_prompt_tokens
        self._layout = layout
        self._source = layout
        self._source_digest = b""
        self._num_hit_pages = 0  # of the sender
        self._all_layers = (1 << layout.num_layers) - 1
        # Per page of the sender, a bit per layer that is here or that a frame brings.
        self._covered: list[int] = []
        self._received: list[int] = []  # likewise, a bit per layer that is here and verified
        self._checksums: dict[int, int] = {}  # by seq, of the frames that lie in pages
        self._landing: set[int] = set()  # seqs between header and the end of their payload
        self._scattering: set[int] = set()  # seqs that are verified, or brought into pages

    @property
    def source(self) -> KVLayout:
        """The layout of the sender, once it has begun: its pages are what frames carry."""
        return self._source

    @property
    def lands_in_pages(self) -> bool:
        """Whether the payload of a frame is, byte for byte, what the pages here shall hold."""
        return self._source == self._layout

    @property
    def hit_unit(self) -> int:
        """Pages of this worker that hold whole pages of the sender: hits count in these."""
        return max(1, self._source.page_size // self._layout.page_size)

    @property
    def is_open(self) -> bool:
        """Whether the sender knows of the hand-off and has not been told of its end."""
        return self.state in (ReceiverState.WAITING, ReceiverState.RECEIVING)

    @property
    def num_received_tokens(self) -> int:
        """Leading tokens of the prompt whose KV is here in all layers, verified."""
        num_pages = sum(1 for _ in takewhile(self._all_layers.__eq__, self._received))
        return min(num_pages * self._source.page_size, self._num_prompt_tokens)

    @property
    def wants_credit(self) -> bool:
        """Whether another slot could be of use."""
        return self.state is ReceiverState.RECEIVING and self.seal is None

    def on_open(self, message: Open) -> RefuseReason | None:
        """The sender begins; None when all is as agreed. A ticket works once."""
        if self.state is not ReceiverState.EXPECTED:
            return None
        if message.ticket != self._ticket:
            return RefuseReason.UNKNOWN_TICKET
        if not message.layout.holds_same_kv(self._layout):
            return RefuseReason.LAYOUT
        if (message.prefix_hash, message.num_prompt_tokens) != (
            self._prefix_hash,
            self._num_prompt_tokens,
        ):
            return RefuseReason.PREFIX
        self._source = message.layout
        self._source_digest = message.layout.digest()
        self._covered = [0] * message.layout.num_pages(self._num_prompt_tokens)
        self._received = self._covered.copy()
        self.state = ReceiverState.WAITING
        return None

    def on_reserved(self, num_hits: int = 0) -> int:
        """There is room, and the first `num_hits` pages of the prompt are here, in whole units.

        Returns how many pages of the sender these are.
        """
        if self.state is not ReceiverState.WAITING:
            return 0
        self.state = ReceiverState.RECEIVING
        count = num_hits * self._layout.page_size // self._source.page_size
        self._covered[:count] = self._received[:count] = [self._all_layers] * count
        self._num_hit_pages = count
        return count

    def pages_of(self, frame: Frame) -> range:
        """The pages that `frame` is scattered into, by their index in the sequence."""
        first = frame.first_page * self._source.page_size
        end = first + frame.num_pages * self._source.page_size
        end = min(end, self._num_prompt_tokens)
        return range(first // self._layout.page_size, self._layout.num_pages(end))

    def is_repeated(self, frame: Frame) -> bool:
        return any(frame.seq in seqs for seqs in (self._landing, self._scattering, self._checksums))

    def agrees(self, frame: Frame, length: int) -> bool:
        """Whether a frame with `length` bytes of payload is one that this hand-off can have.

        No layer of a page comes twice: what has landed is never written again.
        """
        part = frame.part
        return (
            frame.layout_digest == self._source_digest
            and frame.prefix_hash == self._prefix_hash
            and part.num_pages > 0
            and part.num_layers > 0
            and part.first_page >= self._num_hit_pages  # which are shared: nothing writes them
            and part.first_page + part.num_pages <= len(self._covered)
            and part.first_layer + part.num_layers <= self._layout.num_layers
            and length == part.num_bytes(self._source)
            and not any(self._covered[page] & _layers_of(frame) for page in _pages_of(frame))
        )

    def on_landing(self, frame: Frame) -> None:
        """The header was accepted, which `agrees`: the payload goes to its place."""
        if self.state is ReceiverState.RECEIVING and not self.is_repeated(frame):
            self._landing.add(frame.seq)
            for page in _pages_of(frame):
                self._covered[page] |= _layers_of(frame)

    def on_landed(self, frame: Frame) -> None:
        """The payload is complete."""
        if frame.seq in self._landing:
            self._landing.remove(frame.seq)
            self._scattering.add(frame.seq)

    @property
    def needs_sender(self) -> bool:
        """Whether anything is still to come: the Seal, or a frame that is not all here."""
        if self.seal is None or self._landing:
            return True
        return len(self._checksums) + len(self._scattering) < self.seal.num_frames

    def on_scattered(self, frame: Frame) -> RefuseReason | None:
        """The frame was verified and lies in pages."""
        if self.state is not ReceiverState.RECEIVING or frame.seq not in self._scattering:
            return None
        self._scattering.remove(frame.seq)
        self._checksums[frame.seq] = frame.checksum
        for page in _pages_of(frame):
            self._received[page] |= _layers_of(frame)
        return self._become_ready_if_complete()

    def on_seal(self, seal: Seal) -> RefuseReason | None:
        """Every frame is out; some may still be on their way into pages."""
        if self.state is ReceiverState.RECEIVING and self.seal is None:
            self.seal = seal
            return self._become_ready_if_complete()
        return None

    def close(self) -> None:
        """Give the hand-off up, unless it is complete. Idempotent."""
        if self.state is not ReceiverState.READY:
            self.state = ReceiverState.CLOSED

    def _become_ready_if_complete(self) -> RefuseReason | None:
        if self.seal is None or self.needs_sender or self._scattering:
            return None
        seqs = range(self.seal.num_frames)
        if self._checksums.keys() != set(seqs):
            return RefuseReason.INTEGRITY
        digest = digest_of(self._checksums[seq] for seq in seqs)
        is_covered = all(layers == self._all_layers for layers in self._received)
        if digest != self.seal.digest or not is_covered:
            return RefuseReason.INTEGRITY
        self.state = ReceiverState.READY
        return None


def _pages_of(frame: Frame) -> range:
    """The pages of the sender in `frame`."""
    return range(frame.first_page, frame.first_page + frame.num_pages)


def _layers_of(frame: Frame) -> int:
    """A bit for each layer in `frame`."""
    return ((1 << frame.num_layers) - 1) << frame.first_layer
