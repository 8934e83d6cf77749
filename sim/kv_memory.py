"""The page memory of a simulated worker: real bytes in the real layout, only small."""

from collections.abc import Sequence

from pagewire.kv_transfer.layout import FrameRange, KVLayout, byte_runs

LAYOUT = KVLayout(page_size=16, num_layers=2, num_kv_heads=1, head_dim=1, dtype="float32")
"""One word of 4 bytes for each token, layer and K or V: the smallest page there is."""

LANES = 2 * LAYOUT.num_layers  # words of one token


class KvMemory:
    """Pages in `LAYOUT`, as bytes for frames and as words for the model.

    Pages keep what was written last when they change hands, as real ones do.
    """

    def __init__(self, num_pages: int) -> None:
        self._bytes = memoryview(bytearray(num_pages * LAYOUT.page_bytes))
        self._words = self._bytes.cast("I")  # [num_pages * LANES * page_size]

    def gather(self, part: FrameRange, page_table: tuple[int, ...]) -> bytes:
        """The payload of a frame."""
        runs = byte_runs(LAYOUT, part, page_table)
        return b"".join(self._bytes[offset : offset + length] for offset, length in runs)

    def scatter(self, part: FrameRange, page_table: tuple[int, ...], payload: bytes) -> None:
        """Copy a payload into pages."""
        position = 0
        for offset, length in byte_runs(LAYOUT, part, page_table):
            self._bytes[offset : offset + length] = payload[position : position + length]
            position += length

    def copy(self, source: int, destination: int) -> None:
        """Copy a whole page."""
        size = LAYOUT.page_bytes
        content = self._bytes[source * size : (source + 1) * size]
        self._bytes[destination * size : (destination + 1) * size] = content

    def write(self, page_table: Sequence[int], position: int, lane: int, word: int) -> None:
        self._words[self._index(page_table, position, lane)] = word

    def read(self, page_table: Sequence[int], position: int, lane: int) -> int:
        return self._words[self._index(page_table, position, lane)]

    def lane_sum(self, page: int, lane: int, num_slots: int) -> int:
        """Sum of the first `num_slots` words of one lane of a page."""
        start = (page * LANES + lane) * LAYOUT.page_size
        return sum(self._words[start : start + num_slots])

    def _index(self, page_table: Sequence[int], position: int, lane: int) -> int:
        index, slot = divmod(position, LAYOUT.page_size)
        return (page_table[index] * LANES + lane) * LAYOUT.page_size + slot
