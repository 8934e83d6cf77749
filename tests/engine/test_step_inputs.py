"""The tensors of a step, and the memory that they share with those of other steps."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.engine.batch import BatchRow
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.step_inputs import InputLimits, prepare
from pagewire.engine.step_memory import StepInputs, StepMemory

PAGE_SIZE = 4
LIMITS = InputLimits(vocab_size=100, num_pages=50, page_size=PAGE_SIZE, max_model_len=40)
CPU = torch.device("cpu")


@st.composite
def batch_rows(draw: st.DrawFn) -> BatchRow:
    """A decode row, one with drafts, or a chunk of a prompt that samples or does not."""
    num_tokens = draw(st.sampled_from([1, 1, 1, 3, 9]))
    start = draw(st.integers(0, LIMITS.max_model_len - num_tokens))
    num_pages = -(-(start + num_tokens) // PAGE_SIZE)
    pages = st.integers(0, LIMITS.num_pages - 1)
    return BatchRow(
        request_id="request",
        token_ids=draw(st.lists(st.integers(0, 99), min_size=num_tokens, max_size=num_tokens)),
        start=start,
        page_table=draw(st.lists(pages, min_size=num_pages, max_size=num_pages + 2)),
        sampling=SamplingParams() if draw(st.booleans()) else None,
        num_drafts=draw(st.integers(0, num_tokens - 1)),
    )


steps = st.lists(st.lists(batch_rows(), min_size=1, max_size=4), min_size=1, max_size=5)


def values(inputs: StepInputs) -> list[object]:
    batch = inputs.attention
    tensors = (inputs.token_ids, batch.cu_seqlens, batch.context_lens, batch.page_table)
    more = (batch.positions, batch.slots, inputs.logits_of)
    return [tensor.tolist() for tensor in (*tensors, *more)]


def expected(rows: list[BatchRow]) -> list[object]:
    """From the definitions, one row and one token after another."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logits_of: list[int] = []
    starts = [0]
    contexts = [row.start + len(row.token_ids) for row in rows]
    tables = [
        list(row.page_table[: -(-context // PAGE_SIZE)])
        for row, context in zip(rows, contexts, strict=True)
    ]
    for row, table in zip(rows, tables, strict=True):
        for position, token in enumerate(row.token_ids, start=row.start):
            tokens.append(token)
            positions.append(position)
            slots.append(table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
        starts.append(len(tokens))
        if row.sampling:
            logits_of += range(len(tokens) - row.num_drafts - 1, len(tokens))
    width = max(map(len, tables))
    padded = [table + [0] * (width - len(table)) for table in tables]
    return [tokens, starts, contexts, padded, positions, slots, logits_of]


@settings(max_examples=40)
@given(steps)
def test_steps_that_share_memory_leave_nothing_behind(batches: list[list[BatchRow]]) -> None:
    memory = StepMemory(CPU)
    for rows in batches:
        assert values(prepare(rows, LIMITS, memory).inputs()) == expected(rows)


def test_decode_steps_use_the_same_memory() -> None:
    memory = StepMemory(CPU)
    addresses = set()
    for position in (5, 6, 7):
        row = BatchRow(
            request_id="request",
            token_ids=(position,),
            start=position,
            page_table=[3, 4],
            sampling=SamplingParams(),
        )
        inputs = prepare([row, row], LIMITS, memory).inputs()
        addresses.add((inputs.token_ids.data_ptr(), inputs.attention.page_table.data_ptr()))
    assert len(addresses) == 1


def test_a_device_gets_copies() -> None:
    """`meta` stands for a device that does not share the memory of the host."""
    row = BatchRow(
        request_id="request", token_ids=(1,), start=0, page_table=[0], sampling=SamplingParams()
    )
    inputs = prepare([row], LIMITS, StepMemory(torch.device("meta"))).inputs()
    assert inputs.token_ids.device.type == inputs.attention.slots.device.type == "meta"
