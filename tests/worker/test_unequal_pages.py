"""Hand-offs between workers with pages of unequal size: who counts in whose, and what is shared."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from handoff_pair import (
    DECODE,
    HASHER,
    LAYOUT,
    PREFILL,
    HandoffPair,
    abort_command,
    attach_command,
    decode_core,
    prefill_command,
    prefill_core,
    sampling,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.worker.effects import Effect, Scatter

SIZE_PAIRS = [pair for pair in product((16, 32, 64), repeat=2) if pair[0] != pair[1]]


class UnequalPair(HandoffPair):
    """Checks that no frame is scattered into a page that is shared; counts tokens sent."""

    def __init__(self, prefill_size: int, decode_size: int, num_tokens: int = 512) -> None:
        layouts = [replace(LAYOUT, page_size=size) for size in (prefill_size, decode_size)]
        hashers = [replace(HASHER, page_size=size) for size in (prefill_size, decode_size)]
        super().__init__(
            prefill_core(
                num_pages=num_tokens // prefill_size,
                max_batch_tokens=64,
                slot_bytes=layouts[0].page_bytes,
                hasher=hashers[0],
                layout=layouts[0],
            ),
            decode_core(
                num_pages=num_tokens // decode_size,
                slot_bytes=layouts[0].page_bytes,
                hasher=hashers[1],
                layout=layouts[1],
            ),
        )
        self.num_layers_sent = 0  # of one token each

    def start(self, prompt: Sequence[int], name: str) -> None:
        params = sampling(max_tokens=3)
        self.carry_out(
            self.decode.on_command(attach_command(prompt, request_id=name, params=params), 0.0)
        )
        self.carry_out(
            self.prefill.on_command(prefill_command(prompt, request_id=name, params=params), 0.0)
        )

    def serve(self, prompt: Sequence[int], name: str) -> int:
        """Run one request to its end; returns the tokens in the pages that were sent."""
        before = self.num_layers_sent
        self.start(prompt, name)
        self.run()
        self.check_nothing_is_left()
        assert not self.failures()
        num_tokens, rest = divmod(self.num_layers_sent - before, LAYOUT.num_layers)
        assert not rest
        return num_tokens

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Scatter):
                self._check_scatter(effect)
        super().carry_out(effects)

    def _check_scatter(self, effect: Scatter) -> None:
        frame, size = effect.frame, self.decode.layout.page_size
        assert effect.source == self.prefill.layout
        first = frame.first_page * effect.source.page_size
        end = first + frame.num_pages * effect.source.page_size
        self.num_layers_sent += (end - first) * frame.num_layers
        pages = effect.page_table[first // size : -(-end // size)]
        assert pages
        assert not any(self.decode.pool.is_cached(page) for page in pages)


@pytest.mark.parametrize(("prefill_size", "decode_size"), SIZE_PAIRS)
def test_every_length_of_prompt_arrives_whole(prefill_size: int, decode_size: int) -> None:
    for length in (1, 15, 16, 17, 63, 64, 65, 100, 128, 130):
        pair = UnequalPair(prefill_size, decode_size)
        assert pair.serve([1] * length, "request") == -(-length // prefill_size) * prefill_size


@pytest.mark.parametrize(
    ("prefill_size", "decode_size", "num_prompt_tokens", "num_sent"),
    [
        (16, 64, 70, 16),  # one page of 64 is there, of the pages of 16 the fifth is not
        (16, 64, 63, 64),  # no full page of 64
        (64, 16, 70, 64),  # four pages of 16 make the first of 64
        (64, 16, 100, 64),  # two of six pages of 16 make no whole page of 64: they come again
        (64, 16, 128, 0),  # all eight make two
        (32, 16, 50, 32),
    ],
)
def test_hits_count_in_whole_pages_of_the_sender(
    prefill_size: int, decode_size: int, num_prompt_tokens: int, num_sent: int
) -> None:
    pair = UnequalPair(prefill_size, decode_size)
    prompt = [1] * num_prompt_tokens
    pair.serve(prompt, "first")
    assert pair.serve(prompt, "second") == num_sent


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_ends_at_any_step_leaves_nothing(data: st.DataObject) -> None:
    prefill_size, decode_size = data.draw(st.sampled_from(SIZE_PAIRS))
    pair = UnequalPair(prefill_size, decode_size, num_tokens=192)
    for index in range(4):
        length = data.draw(st.integers(1, 150))
        pair.start([index % 2] * length, f"request-{index}")
    for _ in range(data.draw(st.integers(0, 60))):
        data.draw(st.sampled_from(pair.steps()))()
        pair.prefill.check_integrity()
        pair.decode.check_integrity()
    for victim in data.draw(st.sets(st.integers(0, 3))):
        for core, receiver in ((pair.prefill, PREFILL), (pair.decode, DECODE)):
            pair.carry_out(core.on_command(abort_command(receiver, f"request-{victim}"), 0.0))
    pair.run()
    pair.check_nothing_is_left()
