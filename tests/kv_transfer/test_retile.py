"""Payloads into pages of another size: every plan against a copy of one value at a time."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.kv_transfer.layout import PAGE_SIZES, FrameRange, KVLayout, byte_runs, plan_frames
from pagewire.kv_transfer.reshard import HeadSplit, plan_heads
from pagewire.kv_transfer.retile import ScatterPlan, plan_scatter

Bytes = npt.NDArray[np.uint8]

HEAD_DIM = 2
DTYPES = {"float32": 4, "int8": 1}  # without and with scales; the width is all that counts
NUM_LAYERS = 2
NUM_TOKENS = 150  # no multiple of any page size


def layout(page_size: int, num_kv_heads: int, dtype: str) -> KVLayout:
    return KVLayout(
        page_size=page_size,
        num_layers=NUM_LAYERS,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )


def vectors(layout: KVLayout, page: int, layer: int, head: int, slot: int) -> Iterator[slice]:
    """Where K, V and their scales of one token lie, from the order of dimensions alone."""
    segment = ((page * layout.num_layers + layer) * layout.num_kv_heads + head) * layout.head_bytes
    size = HEAD_DIM * DTYPES[layout.dtype]
    for kind in range(2):
        start = segment + (kind * layout.page_size + slot) * size
        yield slice(start, start + size)
    if layout.dtype == "int8":
        for kind in range(2):
            start = segment + 2 * layout.page_size * size + (kind * layout.page_size + slot) * 4
            yield slice(start, start + 4)


def table(layout: KVLayout, seed: int) -> tuple[int, ...]:
    """Pages of a sequence of NUM_TOKENS tokens, in no order, among one that is not its own."""
    order = np.random.default_rng(seed).permutation(layout.num_pages(NUM_TOKENS) + 1)
    return tuple(order[:-1].tolist())


def make_pool(layout: KVLayout, seed: int) -> Bytes:
    num_bytes = (layout.num_pages(NUM_TOKENS) + 1) * layout.page_bytes
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def token(pool: Bytes, layout: KVLayout, page_table: tuple[int, ...], *at: int) -> bytes:
    """K, V and scales of the token at (position, layer, head)."""
    position, layer, head = at
    index, slot = divmod(position, layout.page_size)
    where = vectors(layout, page_table[index], layer, head, slot)
    return b"".join(pool[part].tobytes() for part in where)


def carry_out(plan: ScatterPlan, payload: Bytes, pool: Bytes) -> None:
    """Every run of the plan, one at a time."""
    for run, layer, head in product(plan.runs, range(plan.shape[0]), range(plan.shape[1])):
        source = run.source + layer * plan.source_strides[0] + head * plan.source_strides[1]
        target = run.target + layer * plan.target_strides[0] + head * plan.target_strides[1]
        assert 0 <= source <= len(payload) - run.length
        assert 0 <= target <= len(pool) - run.length
        pool[target : target + run.length] = payload[source : source + run.length]


def gather(pool: Bytes, layout: KVLayout, part: FrameRange, *rest: object) -> Bytes:
    runs = byte_runs(layout, part, *rest)  # type: ignore[arg-type]
    return np.concatenate([pool[offset : offset + length] for offset, length in runs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("from_size", "to_size"), list(product(PAGE_SIZES, PAGE_SIZES)))
def test_all_tokens_arrive_and_nothing_else_is_written(
    from_size: int, to_size: int, dtype: str
) -> None:
    source, target = layout(from_size, 2, dtype), layout(to_size, 2, dtype)
    from_table, to_table = table(source, 1), table(target, 2)
    sent, before = make_pool(source, 3), make_pool(target, 4)
    received = before.copy()
    # Frames of whole pages, and of one layer of a page each.
    for slot_bytes in (3 * source.page_bytes, source.layer_bytes):
        received[:] = before
        for part in plan_frames(source, 0, source.num_pages(NUM_TOKENS), slot_bytes):
            plan = plan_scatter(part, source, target, to_table)
            carry_out(plan, gather(sent, source, part, from_table), received)
        for at in product(range(NUM_TOKENS), range(NUM_LAYERS), range(2)):
            assert token(received, target, to_table, *at) == token(sent, source, from_table, *at)
    (stranger,) = set(range(target.num_pages(NUM_TOKENS) + 1)) - set(to_table)
    kept = slice(stranger * target.page_bytes, (stranger + 1) * target.page_bytes)
    assert np.array_equal(received[kept], before[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("from_degree", "to_degree"), list(product((1, 2, 4, 8), (1, 2, 4, 8))))
@pytest.mark.parametrize(("from_size", "to_size"), [(32, 32), (16, 64), (128, 32)])
def test_ranks_of_unequal_degrees_and_page_sizes(
    from_size: int, to_size: int, from_degree: int, to_degree: int, dtype: str
) -> None:
    """Four heads, which ranks of degree 8 replicate: every rank receives its own."""
    splits = [HeadSplit(num_kv_heads=4, degree=degree) for degree in (from_degree, to_degree)]
    layouts = [
        layout(size, 4 // split.num_shards, dtype)
        for size, split in zip((from_size, to_size), splits, strict=True)
    ]
    (source, target), tables = layouts, [table(item, 1) for item in layouts]
    model = make_pool(layout(from_size, 4, dtype), 5)  # what one rank alone would have
    sent = [shard(model, splits[0].heads(rank), source) for rank in range(from_degree)]
    received = [make_pool(target, rank) for rank in range(to_degree)]
    whole = FrameRange(
        first_page=0,
        num_pages=source.num_pages(NUM_TOKENS),
        first_layer=0,
        num_layers=NUM_LAYERS,
    )
    for item in plan_heads(*splits):
        payload = gather(sent[item.sender], source, whole, tables[0], item.sender_heads)
        packed = replace(source, num_kv_heads=len(item.sender_heads))
        plan = plan_scatter(whole, packed, target, tables[1], item.receiver_heads.start)
        carry_out(plan, payload, received[item.receiver])
    for rank in range(to_degree):
        for index, head in enumerate(splits[1].heads(rank)):
            for position, layer in product(range(0, NUM_TOKENS, 7), range(NUM_LAYERS)):
                expected = token(
                    model, layout(from_size, 4, dtype), tables[0], position, layer, head
                )
                found = token(received[rank], target, tables[1], position, layer, index)
                assert found == expected


def shard(model: Bytes, heads: range, rank: KVLayout) -> Bytes:
    """The pool of a rank: its heads of every layer of every page."""
    view = model.reshape(-1, NUM_LAYERS, 4, rank.head_bytes)
    return view[:, :, heads.start : heads.stop].reshape(-1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_part_of_a_sequence_goes_where_the_whole_would(data: st.DataObject) -> None:
    sizes = st.sampled_from(PAGE_SIZES)
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    source, target = (layout(data.draw(sizes), 1, dtype) for _ in range(2))
    to_table, sent = table(target, 1), make_pool(source, 2)
    num_pages = source.num_pages(NUM_TOKENS)
    first_page = data.draw(st.integers(0, num_pages - 1))
    first_layer = data.draw(st.integers(0, NUM_LAYERS - 1))
    part = FrameRange(
        first_page=first_page,
        num_pages=data.draw(st.integers(1, num_pages - first_page)),
        first_layer=first_layer,
        num_layers=data.draw(st.integers(1, NUM_LAYERS - first_layer)),
    )
    in_order = tuple(range(num_pages))
    received = np.zeros(len(make_pool(target, 0)), dtype=np.uint8)
    carry_out(
        plan_scatter(part, source, target, to_table),
        gather(sent, source, part, in_order),
        received,
    )
    tokens = range(
        first_page * source.page_size,
        min((first_page + part.num_pages) * source.page_size, NUM_TOKENS),
    )
    for position, layer in product(range(NUM_TOKENS), range(NUM_LAYERS)):
        is_sent = position in tokens and first_layer <= layer < first_layer + part.num_layers
        expected = token(sent, source, in_order, position, layer, 0)
        found = token(received, target, to_table, position, layer, 0)
        assert found == (expected if is_sent else bytes(len(expected)))


def test_equal_layouts_are_copied_in_runs_as_long_as_can_be() -> None:
    same = layout(16, 2, "int8")
    whole = FrameRange(first_page=0, num_pages=3, first_layer=0, num_layers=NUM_LAYERS)
    plan = plan_scatter(whole, same, same, (4, 5, 9))
    assert plan.shape == (1, 1)
    assert [run.length for run in plan.runs] == [2 * same.page_bytes, same.page_bytes]


def test_unequal_page_sizes_are_copied_in_one_run_for_each_kind_of_vector() -> None:
    whole = FrameRange(first_page=0, num_pages=1, first_layer=0, num_layers=NUM_LAYERS)
    plan = plan_scatter(whole, layout(64, 2, "int8"), layout(128, 2, "int8"), (3,))
    assert plan.shape == (NUM_LAYERS, 2)
    assert [run.length for run in plan.runs] == [64 * HEAD_DIM] * 2 + [64 * 4] * 2
