"""How the KV cache of a worker lies in memory, and which byte runs a frame is made of.

One byte-typed pool holds all layers: ``[page][layer][kv_head][K|V][slot][head_dim]``. A page is one
contiguous run, a layer of a page is one run, a head range of a layer is one run; what quantised
values need beside them is part of these runs. Pure arithmetic: nothing here knows torch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
SCALE_BYTES = {
    "int8": 4,
    "float8_e4m3fn": 4,
}  # float32, one for each token's K and one for its V in each head
PAGE_SIZES = (16, 32, 64, 128)


class LayoutError(ValueError):
    """A layout that cannot be, or two layouts that do not fit each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The shape of one page of KV cache.

    Raises LayoutError when a field is out of range.
    """

    page_size: int  # token slots
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPE_BYTES)}")
        if self.page_size not in PAGE_SIZES:
            raise LayoutError(f"page_size is {self.page_size}; choose one of {PAGE_SIZES}")
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head in one layer of one page.

        ``[K|V][slot][head_dim]``, and behind quantised values their scales, ``[K|V][slot]``.
        """
        vector_bytes = self.head_dim * DTYPE_BYTES[self.dtype] + SCALE_BYTES.get(self.dtype, 0)
        return 2 * self.page_size * vector_bytes

    def vectors(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes of one slot) of each ``[slot]`` run in `head_bytes`: of K, of V, and of
        quantised values the scales of K and of V.
        """
        offset = 0
        for slot_bytes in (self.head_dim * DTYPE_BYTES[self.dtype], SCALE_BYTES.get(self.dtype, 0)):
            for _ in range(2 if slot_bytes else 0):
                yield offset, slot_bytes
                offset += self.page_size * slot_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one page."""
        return self.num_kv_heads * self.head_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers."""
        return self.num_layers * self.layer_bytes

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def holds_same_kv(self, other: "KVLayout") -> bool:
        """Whether the KV of one can be brought into pages of the other.

        Page sizes and dtypes may differ.
        """
        return (self.num_layers, self.num_kv_heads, self.head_dim) == (
            other.num_layers,
            other.num_kv_heads,
            other.head_dim,
        )

    def digest(self) -> bytes:
        """16 bytes that two workers compare before they exchange pages."""
        text = ";".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FrameRange:
    """What one frame carries: pages of one sequence, by their index in it, and layers of them."""

    first_page: int
    num_pages: int
    first_layer: int
    num_layers: int

    def num_bytes(self, layout: KVLayout) -> int:
        return self.num_pages * self.num_layers * layout.layer_bytes


def require_slot(layout: KVLayout, slot_bytes: int) -> None:
    """Raise LayoutError when not even one layer of a page fits in a staging slot."""
    if layout.layer_bytes > slot_bytes:
        raise LayoutError(
            f"one layer of a page is {layout.layer_bytes} bytes, a staging slot {slot_bytes}; "
            "raise slot_bytes or lower page_size"
        )


def plan_frames(
    layout: KVLayout, first_page: int, end_page: int, slot_bytes: int
) -> Iterator[FrameRange]:
    """Cut pages ``first_page..end_page`` of a sequence into frames of at most `slot_bytes`.

    Whole pages while one fits in a slot, layer groups of one page otherwise. Raises LayoutError
    when not even one layer of a page fits.
    """
    require_slot(layout, slot_bytes)
    pages_per_frame = slot_bytes // layout.page_bytes
    if pages_per_frame:
        for page in range(first_page, end_page, pages_per_frame):
            yield FrameRange(
                first_page=page,
                num_pages=min(pages_per_frame, end_page - page),
                first_layer=0,
                num_layers=layout.num_layers,
            )
        return
    layers_per_frame = slot_bytes // layout.layer_bytes
    for page in range(first_page, end_page):
        for layer in range(0, layout.num_layers, layers_per_frame):
            yield FrameRange(
                first_page=page,
                num_pages=1,
                first_layer=layer,
                num_layers=min(layers_per_frame, layout.num_layers - layer),
            )


def byte_runs(
    layout: KVLayout,
    frame: FrameRange,
    page_table: tuple[int, ...],
    heads: range | None = None,
) -> Iterator[tuple[int, int]]:
    """(offset, length) of each contiguous run of `frame` in a pool, in payload order.

    `page_table` maps the sequence's page indices to pages of the pool. Neighbouring pages that are
    sent with all their layers come as one run. Of a range of `heads` there is one run for each page
    and layer; None stands for all.
    """
    heads = heads or range(layout.num_kv_heads)
    has_all = len(heads) == layout.num_kv_heads  # then the layers of a page are one run
    num_layers, layer_step = (1, frame.num_layers) if has_all else (frame.num_layers, 1)
    length = layer_step * len(heads) * layout.head_bytes
    first = frame.first_layer * layout.layer_bytes + heads.start * layout.head_bytes
    start = end = -1
    for index in range(frame.first_page, frame.first_page + frame.num_pages):
        for layer in range(num_layers):
            offset = page_table[index] * layout.page_bytes + first + layer * layout.layer_bytes
            if offset == end:
                end += length
                continue
            if start >= 0:
                yield start, end - start
            start, end = offset, offset + length
    if start >= 0:
        yield start, end - start
