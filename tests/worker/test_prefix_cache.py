"""The prefix cache across a hand-off: what is computed, what is sent, and what is kept."""

from collections.abc import Sequence

from handoff_pair import (
    DECODE,
    HASHER,
    LAYOUT,
    PREFILL,
    TOKEN,
    HandoffPair,
    abort_command,
    attach_command,
    decode_core,
    prefill_command,
    prefill_core,
    sampling,
    step_result,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.kv_transfer.messages import Accepted, Grant, HandoffId
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Emit, SendFrame

PROMPT = [1] * 70  # 4 full pages and 6 tokens
PAGE = LAYOUT.page_size


class CountingPair(HandoffPair):
    """Counts the prompt tokens that are computed and the pages that are sent."""

    def __init__(self, *, prefill_pages: int = 16, decode_pages: int = 16) -> None:
        super().__init__(
            prefill_core(num_pages=prefill_pages, max_batch_tokens=64, hasher=HASHER),
            decode_core(num_pages=decode_pages, hasher=HASHER),
        )
        self.num_layers_sent = 0  # of one page each

    @property
    def num_computed(self) -> int:
        return self.prefill.state().prompt_tokens

    def start(self, prompt: Sequence[int], name: str, salt: str = "", max_tokens: int = 3) -> None:
        attach = attach_command(prompt, request_id=name, params=sampling(max_tokens))
        prefill = prefill_command(prompt, request_id=name, params=sampling(max_tokens))
        attach.attach.cache_salt = prefill.prefill.cache_salt = salt
        self.carry_out(self.decode.on_command(attach, 0.0))
        self.carry_out(self.prefill.on_command(prefill, 0.0))

    def finish_sending(self) -> None:
        frame = self._sending[0].frame
        self.num_layers_sent += frame.num_pages * frame.num_layers
        super().finish_sending()

    def first_tokens(self) -> list[pb.FirstToken]:
        return [event.first_token for event in self.events if event.HasField("first_token")]

    def serve(
        self, prompt: Sequence[int], name: str, salt: str = "", max_tokens: int = 3
    ) -> tuple[int, int]:
        """Run one request to its end; tokens that it computed and pages that it sent."""
        before = self.num_computed, self.num_layers_sent
        self.start(prompt, name, salt, max_tokens)
        self.run()
        self.check_nothing_is_left()
        assert not self.failures()
        num_pages, rest = divmod(self.num_layers_sent - before[1], LAYOUT.num_layers)
        assert not rest
        return self.num_computed - before[0], num_pages


def test_a_repeated_prompt_computes_and_sends_its_tail_only() -> None:
    pair = CountingPair()
    assert pair.serve(PROMPT, "first") == (70, 5)
    assert pair.serve(PROMPT, "second") == (6, 1)
    assert pair.serve([*PROMPT[:40], 2, *PROMPT[41:]], "third") == (38, 3)
    assert [token.cached_tokens for token in pair.first_tokens()] == [0, 64, 32]


def test_the_last_prompt_token_is_always_computed() -> None:
    pair = CountingPair()
    assert pair.serve([1] * 64, "first") == (64, 4)
    assert pair.serve([1] * 64, "second") == (16, 0)


def test_the_next_turn_of_a_conversation_finds_its_answer_on_the_decode_worker() -> None:
    pair = CountingPair()
    pair.serve(PROMPT, "first", max_tokens=28)
    conversation = [*PROMPT, *[TOKEN] * 28, 5]
    computed, sent = pair.serve(conversation, "second")
    assert computed == 99 - 64  # the prefill worker never saw the answer
    assert sent == 1  # 97 of 98 tokens have their KV on the decode worker: 6 full pages


def test_another_salt_shares_nothing() -> None:
    pair = CountingPair()
    pair.serve(PROMPT, "first", salt="one tenant")
    assert pair.serve(PROMPT, "second", salt="another") == (70, 5)


def test_equal_prompts_that_come_at_once_are_computed_and_kept_once() -> None:
    pair = CountingPair()
    pair.start([1] * 32, "first")
    pair.start([1] * 32, "second")
    pair.run()
    pair.check_nothing_is_left()
    assert pair.num_computed == 32 + 16  # the page with the last token is computed for its logits
    assert len(pair.prefill.cache) == 2


def test_an_eviction_breaks_no_stream() -> None:
    pair = CountingPair(prefill_pages=6, decode_pages=6)
    for index in range(6):
        pair.serve([index] * 70, f"request-{index}")
        assert pair.serve([index] * 70, f"again-{index}")[0] == 6


def test_cached_pages_leave_before_anything_is_computed() -> None:
    pair = CountingPair()
    pair.serve(PROMPT, "first")
    pair.prefill.on_command(prefill_command(PROMPT, request_id="second"), 0.0)
    pair.prefill.next_batch(0.0)
    id = HandoffId(request_id="second", attempt=1, sender=DECODE, receiver=PREFILL)
    pair.carry_out(pair.prefill.on_message(DECODE, Accepted(id=id, num_hit_pages=0), 0.0))
    (frame,) = pair.prefill.on_message(DECODE, Grant(id=id, slot=0, slot_generation=0), 0.0)
    assert isinstance(frame, SendFrame) and frame.frame.first_page == 0


def test_a_step_that_fails_caches_nothing() -> None:
    core = prefill_core(hasher=HASHER)
    core.on_command(prefill_command(PROMPT), 0.0)
    core.next_batch(0.0)
    core.on_batch_failed({0})
    core.check_integrity()
    assert len(core.cache) == 0
    assert core.pool.counts().free == core.pool.num_pages


def test_a_step_that_was_aborted_caches_nothing() -> None:
    core = prefill_core(hasher=HASHER)
    core.on_command(prefill_command(PROMPT), 0.0)
    batch, _ = core.next_batch(0.0)
    assert batch is not None
    core.on_command(abort_command(PREFILL), 0.0)
    core.on_batch_done(step_result(batch), 0.0)
    core.check_integrity()
    assert len(core.cache) == 0


def test_no_step_writes_a_page_that_is_shared() -> None:
    """Which is why sharing needs no copy: only full pages are shared."""
    pair = CountingPair()
    pair.serve(PROMPT, "first", max_tokens=30)
    shared = [
        {page for page in range(16) if core.pool.is_cached(page)}
        for core in (pair.prefill, pair.decode)
    ]
    assert all(shared)
    pair.start([*PROMPT, *[TOKEN] * 10], "second")
    while not pair.prefill.is_idle or not pair.decode.is_idle:
        for batch, pages in zip(pair.running_batches(), shared, strict=True):
            for row in batch.rows if batch else ():
                end = row.start + len(row.token_ids) - 1
                written = row.page_table[row.start // PAGE : end // PAGE + 1]
                assert not pages & set(written)
        for step in pair.steps():
            step()


def test_a_decode_worker_that_claims_too_much_is_not_believed() -> None:
    core = prefill_core(hasher=HASHER)
    core.on_command(prefill_command(PROMPT), 0.0)
    core.next_batch(0.0)
    id = HandoffId(request_id="request", attempt=1, sender=DECODE, receiver=PREFILL)
    effects = core.on_message(DECODE, Accepted(id=id, num_hit_pages=6), 0.0)
    (event,) = [effect.event for effect in effects if isinstance(effect, Emit)]
    assert event.failed.code == pb.FAILURE_CODE_INTEGRITY


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_requests_that_share_and_end_at_any_step_leave_nothing(data: st.DataObject) -> None:
    pair = CountingPair(prefill_pages=8, decode_pages=8)
    for index in range(4):
        length = data.draw(st.integers(1, 80))
        pair.start([index % 2] * length, f"request-{index}")
    for _ in range(data.draw(st.integers(0, 60))):
        data.draw(st.sampled_from(pair.steps()))()
        pair.prefill.check_integrity()
        pair.decode.check_integrity()
    victims = data.draw(st.sets(st.integers(0, 3)))
    for victim in victims:
        for core, receiver in ((pair.prefill, PREFILL), (pair.decode, DECODE)):
            pair.carry_out(core.on_command(abort_command(receiver, f"request-{victim}"), 0.0))
    pair.run()
    pair.check_nothing_is_left()
