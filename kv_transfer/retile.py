"""Where the payload of a frame goes in pages of another size or with other KV heads. Pure.

A payload is packed as the pages of its sender are: ``[page][layer][kv_head]`` and in each of these
what `KVLayout.head_bytes` says. Only offsets are computed here, and only for equal dtypes; where
values must be converted, `slot_runs` says which slots go where.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pagewire.kv_transfer.layout import FrameRange, KVLayout, byte_runs


class SlotRun(NamedTuple):
    """Neighbouring token slots that are in one page before and in one page after."""

    source_page: int  # counted from the first of the payload
    source_slot: int
    page: int  # of the receiver's pool
    slot: int
    num_slots: int


class ByteRun(NamedTuple):
    """Contiguous bytes, in the first layer and KV head that a plan covers."""

    source: int  # offset in the payload
    target: int  # offset in the receiver's pool
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterPlan:
    """The copies that bring one payload into pages: each run, in each layer and head.

    The run of layer l and head h lies ``l * strides[0] + h * strides[1]`` bytes behind its offset.
    """

    shape: tuple[int, int]  # layers, heads
    source_strides: tuple[int, int]  # bytes
    target_strides: tuple[int, int]  # bytes
    runs: tuple[ByteRun, ...]


def slot_runs(
    part: FrameRange, source: KVLayout, target: KVLayout, page_table: tuple[int, ...]
) -> Iterator[SlotRun]:
    """The slots of `part`, which counts pages of `source`, in the pages of `page_table`.

    Slots behind the last page of the table are left out: a page of the sender may reach further
    beyond the end of the prompt than the pages that the receiver has for it.
    """
    start = token = part.first_page * source.page_size
    end = min(token + part.num_pages * source.page_size, len(page_table) * target.page_size)
    while token < end:
        source_page, source_slot = divmod(token - start, source.page_size)
        index, slot = divmod(token, target.page_size)
        num_slots = min(source.page_size - source_slot, target.page_size - slot, end - token)
        yield SlotRun(source_page, source_slot, page_table[index], slot, num_slots)
        token += num_slots


def plan_scatter(
    part: FrameRange,
    source: KVLayout,
    target: KVLayout,
    page_table: tuple[int, ...],
    first_head: int = 0,
    heads: range | None = None,
) -> ScatterPlan:
    """How the payload of `part` goes into the pages of `page_table`.

    `source` is the layout of the payload: it has as many KV heads as the frame carries. Of these
    `heads`, or all, go to the heads from `first_head` on of `target`. Equal layouts are copied in
    runs as long as can be. The layouts must agree in head_dim and dtype.
    """
    if source == target:
        return _plan_pages(part, source, page_table)
    heads = heads or range(source.num_kv_heads)
    plan = _plan_heads if source.page_size == target.page_size else _plan_slots
    return plan(part, source, target, page_table, first_head, heads)


def _plan_pages(part: FrameRange, layout: KVLayout, page_table: tuple[int, ...]) -> ScatterPlan:
    """One run for each page, or for pages that are neighbours on both sides."""
    runs, position = [], 0
    for offset, length in byte_runs(layout, part, page_table):
        runs.append(ByteRun(position, offset, length))
        position += length
    return ScatterPlan(shape=(1, 1), source_strides=(0, 0), target_strides=(0, 0), runs=tuple(runs))


def _plan_heads(
    part: FrameRange,
    source: KVLayout,
    target: KVLayout,
    page_table: tuple[int, ...],
    first_head: int,
    heads: range,
) -> ScatterPlan:
    """One run for each page and layer: its heads are neighbours on both sides."""
    payload_page_bytes = part.num_layers * source.layer_bytes
    return ScatterPlan(
        shape=(part.num_layers, 1),
        source_strides=(source.layer_bytes, 0),
        target_strides=(target.layer_bytes, 0),
        runs=tuple(
            ByteRun(
                run.source_page * payload_page_bytes + heads.start * source.head_bytes,
                _first_target(target, run.page, part.first_layer, first_head),
                len(heads) * source.head_bytes,
            )
            for run in slot_runs(part, source, target, page_table)
        ),
    )


def _plan_slots(
    part: FrameRange,
    source: KVLayout,
    target: KVLayout,
    page_table: tuple[int, ...],
    first_head: int,
    heads: range,
) -> ScatterPlan:
    """One run for each range of slots, layer, head and kind of vector in it."""
    payload_page_bytes = part.num_layers * source.layer_bytes
    vectors = list(zip(source.vectors(), target.vectors(), strict=True))
    runs = []
    for run in slot_runs(part, source, target, page_table):
        source_start = run.source_page * payload_page_bytes + heads.start * source.head_bytes
        target_start = _first_target(target, run.page, part.first_layer, first_head)
        for (source_offset, size), (target_offset, _) in vectors:
            runs.append(
                ByteRun(
                    source_start + source_offset + run.source_slot * size,
                    target_start + target_offset + run.slot * size,
                    run.num_slots * size,
                )
            )
    return ScatterPlan(
        shape=(part.num_layers, len(heads)),
        source_strides=(source.layer_bytes, source.head_bytes),
        target_strides=(target.layer_bytes, target.head_bytes),
        runs=tuple(runs),
    )


def _first_target(target: KVLayout, page: int, layer: int, head: int) -> int:
    return page * target.page_bytes + layer * target.layer_bytes + head * target.head_bytes
