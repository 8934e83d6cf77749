"""Frames that are on their way out of a prefill worker: their pages are read until they are sent.

Pure. They outlive the attempt that they belong to: what is on the wire cannot be recalled.
"""

from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.messages import Frame
from pagewire.prefill_worker.sender import Sender
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.worker.effects import SendFrame
from pagewire.worker.identity import AttemptKey


class OutgoingFrames:
    """Keeps the pages of each frame pinned, and its sender known, until it is sent."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._frames: dict[tuple[AttemptKey, int], tuple[Sender, tuple[int, ...]]] = {}  # by seq

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def senders(self) -> list[Sender]:
        """One for each frame, in the order in which they began."""
        return [sender for sender, _ in self._frames.values()]

    def has_any_of(self, key: AttemptKey) -> bool:
        """Whether a frame of this attempt is being sent."""
        return any(each == key for each, _ in self._frames)

    def begin(self, sequence: PrefillSequence, frame: Frame) -> SendFrame:
        """Send a frame of `sequence`."""
        pages = sequence.pages[frame.first_page : frame.first_page + frame.num_pages]
        self._pool.pin(pages)
        self._frames[sequence.key, frame.seq] = (sequence.sender, pages)
        return SendFrame(frame=frame, page_table=sequence.pages)

    def end(self, frame: Frame) -> Sender:
        """Nothing reads the pages of a frame any more; returns its sender."""
        sender, pages = self._frames.pop((AttemptKey.of(frame.id), frame.seq))
        self._pool.unpin(pages)
        return sender
