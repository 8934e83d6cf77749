"""The simulated model notices every wrong byte of KV."""

import pytest

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kv_transfer.layout import FrameRange, plan_frames
from pagewire.sim.kv_memory import LAYOUT, KvMemory
from pagewire.sim.model import SimModel, reference_tokens

PROMPT = list(range(100, 140))  # 3 pages
SAMPLING = SamplingParams(max_tokens=3)
ALL = FrameRange(first_page=0, num_pages=3, first_layer=0, num_layers=LAYOUT.num_layers)


def run(memory: KvMemory, tokens: list[int], start: int, pages: list[int]) -> int:
    row = BatchRow(
        request_id="request", token_ids=tokens, start=start, page_table=pages, sampling=SAMPLING
    )
    ((token,),) = SimModel(memory).execute(Batch(rows=(row,))).tokens
    return token


def test_chunks_and_pages_do_not_matter() -> None:
    expected = reference_tokens(PROMPT, SAMPLING)
    memory = KvMemory(8)
    pages = [6, 1, 3]
    run(memory, PROMPT[:16], 0, pages)
    assert run(memory, PROMPT[16:], 16, pages) == expected[0]
    assert run(memory, expected[:1], 40, pages) == expected[1]
    assert run(memory, expected[1:2], 41, pages) == expected[2]


@pytest.mark.parametrize("slot_bytes", [LAYOUT.layer_bytes, LAYOUT.page_bytes])
def test_frames_carry_everything(slot_bytes: int) -> None:
    expected = reference_tokens(PROMPT, SAMPLING)
    source, target = KvMemory(4), KvMemory(8)
    run(source, PROMPT, 0, [2, 0, 3])
    for part in plan_frames(LAYOUT, 0, 3, slot_bytes):
        target.scatter(part, (7, 1, 4), source.gather(part, (2, 0, 3)))
    assert run(target, expected[:1], 40, [7, 1, 4]) == expected[1]


def test_every_byte_and_the_place_of_every_page_count() -> None:
    memory = KvMemory(3)
    run(memory, PROMPT, 0, [0, 1, 2])
    sound = memory.gather(ALL, (0, 1, 2))
    token = reference_tokens(PROMPT, SAMPLING)[0]
    expected = run(memory, [token], 40, [0, 1, 2])
    memory.scatter(ALL, (1, 0, 2), sound)
    assert run(memory, [token], 40, [0, 1, 2]) != expected
    for index in range(0, 2 * LAYOUT.page_bytes, 7):
        wrong = bytes([*sound[:index], sound[index] ^ 1, *sound[index + 1 :]])
        memory.scatter(ALL, (0, 1, 2), wrong)
        assert run(memory, [token], 40, [0, 1, 2]) != expected


def test_a_stop_token_ends_the_reference() -> None:
    first, second, _ = reference_tokens(PROMPT, SAMPLING)
    stopping = SamplingParams(max_tokens=3, stop_token_ids=frozenset({second}))
    assert reference_tokens(PROMPT, stopping) == [first, second]
