"""Where the payload of one frame may be written on a decode worker."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlace:
    """Straight in the pages of its sequence, or, where these have another layout, in its slot."""

    slot: int
    page_table: tuple[int, ...] | None  # None: in the slot
