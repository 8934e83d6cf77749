"""Layer groups: the last chunk leaves while it is computed, and every layer of every page once."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from handoff_pair import (
    DECODE,
    LAYOUT,
    PREFILL,
    TICKET,
    abort_command,
    prefill_command,
    prefill_core,
    step_result,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.engine.batch import Batch
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import (
    Accepted,
    Closed,
    Frame,
    Grant,
    HandoffId,
    Message,
    Seal,
)
from pagewire.prefill_worker.core import PrefillCore
from pagewire.prefill_worker.layer_groups import layer_group_ends
from pagewire.prefill_worker.sender import Sender
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Effect, Emit, Send, SendFrame

ID = HandoffId(request_id="request", attempt=1, sender=DECODE, receiver=PREFILL)
PROMPT = list(range(40))  # 3 pages, in 2 chunks

Part = tuple[int, int]  # a page of the prompt, and a layer of it


# --- The groups -----------------------------------------------------------------------------------


@given(
    num_layers=st.integers(1, 100),
    num_pages=st.integers(1, 300),
    slot_layers=st.integers(1, 1000),
)
def test_groups_are_even_and_none_is_more_than_a_quarter(
    num_layers: int, num_pages: int, slot_layers: int
) -> None:
    layout = KVLayout(
        page_size=16, num_layers=num_layers, num_kv_heads=1, head_dim=1, dtype="float16"
    )
    slot_bytes = slot_layers * layout.layer_bytes
    ends = layer_group_ends(layout, num_pages, slot_bytes)
    first, *others = [end - start for start, end in pairwise((0, *ends))]
    assert ends[-1] == num_layers
    assert all(size == first for size in others[:-1])
    assert all(0 < size <= first for size in others)
    assert first <= -(-num_layers // 4)
    assert first == 1 or first * num_pages <= slot_layers


def test_a_group_of_a_large_chunk_fills_a_frame() -> None:
    layout = KVLayout(page_size=64, num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32")
    slot_bytes = 4 << 20
    assert layer_group_ends(layout, 1, slot_bytes) == (8, 16, 24, 30)
    assert layer_group_ends(layout, 8, slot_bytes) == (5, 10, 15, 20, 25, 30)
    assert layer_group_ends(layout, 100, slot_bytes) == tuple(range(1, 31))


# --- What leaves, and when ------------------------------------------------------------------------


def parts(frame: Frame) -> Iterator[Part]:
    for page in range(frame.first_page, frame.first_page + frame.num_pages):
        for layer in range(frame.first_layer, frame.first_layer + frame.num_layers):
            yield page, layer


class Handoff:
    """A Sender that is told of progress; what it sends must be computed and fit in a slot."""

    def __init__(self, layout: KVLayout, num_tokens: int, slot_bytes: int) -> None:
        self.layout = layout
        self.num_pages = layout.num_pages(num_tokens)
        self.sent: Counter[Part] = Counter()
        self.sender = Sender(
            id=ID.reply(),
            ticket=TICKET,
            prefix_hash=b"h" * 16,
            num_prompt_tokens=num_tokens,
            layout=layout,
            slot_bytes=slot_bytes,
        )
        self.sender.open(0.0)
        self._slot_bytes = slot_bytes
        self._num_tokens = num_tokens
        self._computed: set[Part] = set()
        self._num_grants = 0
        self._unsent: list[Frame] = []
        self.is_sealed = False

    def accept(self, num_hits: int) -> None:
        self._take(self.sender.on_accepted(num_hits, 0.0))

    def compute(self, num_tokens: int) -> None:
        end = num_tokens // self.layout.page_size
        self._note(
            self.num_pages if num_tokens == self._num_tokens else end, self.layout.num_layers
        )
        self._take(self.sender.on_computed(num_tokens, 0.0))

    def compute_layers(self, num_layers: int) -> None:
        self._note(self.num_pages, num_layers)
        self._take(self.sender.on_layers_computed(num_layers, 0.0))

    def grant(self) -> None:
        grant = Grant(id=ID, slot=self._num_grants, slot_generation=0)
        self._num_grants += 1
        self._take(self.sender.on_grant(grant, 0.0))

    def finish(self) -> None:
        """Token 0 is sampled; then everything that is left leaves."""
        self._take(self.sender.finish((7,), 0.0))
        while not self.is_sealed:
            self.grant()
            while self._unsent:
                self._take(self.sender.on_sent(self._unsent.pop().seq, 5, 0.0))

    def _note(self, num_pages: int, num_layers: int) -> None:
        self._computed |= {
            (page, layer) for page in range(num_pages) for layer in range(num_layers)
        }

    def _take(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if isinstance(message, Seal):
                self.is_sealed = True
                continue
            assert isinstance(message, Frame)
            assert set(parts(message)) <= self._computed
            assert message.part.num_bytes(self.layout) <= self._slot_bytes
            self.sent.update(parts(message))
            self._unsent.append(message)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_the_chunks_and_groups_every_part_leaves_once(data: st.DataObject) -> None:
    layout = KVLayout(
        page_size=16,
        num_layers=data.draw(st.integers(1, 9)),
        num_kv_heads=1,
        head_dim=1,
        dtype="float32",
    )
    num_tokens = data.draw(st.integers(1, 150))
    slot_bytes = data.draw(st.integers(layout.layer_bytes, 3 * layout.page_bytes))
    handoff = Handoff(layout, num_tokens, slot_bytes)
    num_hits = data.draw(st.integers(0, handoff.num_pages))
    is_accepted = False
    groups = st.lists(st.integers(1, layout.num_layers), unique=True).map(sorted)

    def meanwhile() -> None:
        nonlocal is_accepted
        if not is_accepted and data.draw(st.booleans()):
            is_accepted = True
            handoff.accept(num_hits)
        for _ in range(data.draw(st.integers(0, 3))):
            handoff.grant()

    page = 0
    while (page + 1) * layout.page_size < num_tokens and data.draw(st.booleans()):
        # A step that was to end the prompt may fail on its way; the next one takes less of it.
        for num_layers in data.draw(groups):
            handoff.compute_layers(num_layers)
            meanwhile()
        page = data.draw(st.integers(page + 1, (num_tokens - 1) // layout.page_size))
        handoff.compute(page * layout.page_size)
        meanwhile()
    for num_layers in data.draw(groups):
        handoff.compute_layers(num_layers)
        meanwhile()
    handoff.compute(num_tokens)
    if not is_accepted:
        handoff.accept(num_hits)
    handoff.finish()
    assert handoff.sent == Counter(
        (page, layer)
        for page in range(num_hits, handoff.num_pages)
        for layer in range(layout.num_layers)
    )


def test_only_the_last_group_is_left_when_the_step_ends() -> None:
    handoff = Handoff(LAYOUT, 20, LAYOUT.page_bytes)
    handoff.accept(0)
    for _ in range(4):
        handoff.grant()
    handoff.compute_layers(1)
    assert handoff.sent == Counter({(0, 0): 1, (1, 0): 1})
    handoff.compute(20)
    assert handoff.sent == Counter({(page, layer): 1 for page in (0, 1) for layer in (0, 1)})


# --- The core -------------------------------------------------------------------------------------


def begin_step(core: PrefillCore) -> Batch:
    batch, _ = core.next_batch(0.0)
    assert batch is not None
    return batch


def at_its_last_chunk(stream_layers: bool = True) -> tuple[PrefillCore, Batch]:
    """A core that computes the last page of PROMPT, with credit for two frames."""
    core = prefill_core(stream_layers=stream_layers)
    core.on_command(prefill_command(PROMPT), 0.0)
    batch = begin_step(core)
    assert batch.layer_group_ends == ()
    core.on_batch_done(step_result(batch), 0.0)
    core.on_message(DECODE, Accepted(id=ID, num_hit_pages=2), 0.0)
    for slot in range(2):
        core.on_message(DECODE, Grant(id=ID, slot=slot, slot_generation=0), 0.0)
    return core, begin_step(core)


def frames(effects: list[Effect]) -> list[Frame]:
    return [effect.frame for effect in effects if isinstance(effect, SendFrame)]


def test_the_last_chunk_leaves_group_by_group() -> None:
    core, batch = at_its_last_chunk()
    assert batch.layer_group_ends == (1, 2)
    (first,) = frames(core.on_layers_done(1, 0.0))
    (second,) = frames(core.on_layers_done(2, 0.0))
    assert [*parts(first), *parts(second)] == [(2, 0), (2, 1)]
    assert frames(core.on_batch_done(step_result(batch), 0.0)) == []
    core.on_frame_sent(first, 5, 0.0)
    sealed = core.on_frame_sent(second, 6, 0.0)
    (seal,) = [effect.message for effect in sealed if isinstance(effect, Send)]
    assert isinstance(seal, Seal) and seal.num_frames == 2


def test_without_layer_streaming_it_leaves_at_the_end_of_its_step() -> None:
    core, batch = at_its_last_chunk(stream_layers=False)
    assert batch.layer_group_ends == ()
    (frame,) = frames(core.on_batch_done(step_result(batch), 0.0))
    assert [*parts(frame)] == [(2, 0), (2, 1)]


def test_chunks_that_are_not_the_last_wait_for_their_step() -> None:
    core = prefill_core(max_batch_tokens=48)
    core.on_command(prefill_command([1] * 64, request_id="long"), 0.0)
    core.on_command(prefill_command([1] * 16, request_id="short"), 0.0)
    batch = begin_step(core)
    assert [row.request_id for row in batch.rows] == ["short", "long"]
    for request_id in ("short", "long"):
        id = HandoffId(request_id=request_id, attempt=1, sender=DECODE, receiver=PREFILL)
        core.on_message(DECODE, Accepted(id=id, num_hit_pages=0), 0.0)
        core.on_message(DECODE, Grant(id=id, slot=0, slot_generation=0), 0.0)
    (frame,) = frames(core.on_layers_done(1, 0.0))
    assert frame.id.request_id == "short"


def test_a_request_that_was_given_up_sends_nothing_more() -> None:
    core, batch = at_its_last_chunk()
    (frame,) = frames(core.on_layers_done(1, 0.0))
    assert core.on_command(abort_command(PREFILL), 0.0) == []
    assert core.on_layers_done(2, 0.0) == []
    core.on_batch_done(step_result(batch), 0.0)
    assert core.pool.counts().quarantined == 1  # the page of the frame that is being sent
    (closed,) = core.on_frame_sent(frame, 5, 0.0)
    assert isinstance(closed, Send) and isinstance(closed.message, Closed)
    check_nothing_is_left(core)


def test_a_step_that_fails_after_layers_have_left_ends_the_handoff() -> None:
    core, _ = at_its_last_chunk()
    (frame,) = frames(core.on_layers_done(1, 0.0))
    (failure,) = core.on_batch_failed({0})
    assert isinstance(failure, Emit)
    assert failure.event.failed.code == pb.FAILURE_CODE_INTERNAL
    (closed,) = core.on_frame_sent(frame, 5, 0.0)
    assert isinstance(closed, Send) and isinstance(closed.message, Closed)
    check_nothing_is_left(core)


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_layers_that_have_left_do_not_leave_again_when_the_step_is_repeated(
    num_before: int,
) -> None:
    """It failed because of another row."""
    core, _ = at_its_last_chunk()
    sent = [
        frame for end in range(num_before) for frame in frames(core.on_layers_done(end + 1, 0.0))
    ]
    core.on_batch_failed(())
    batch = begin_step(core)
    for end in batch.layer_group_ends:
        sent += frames(core.on_layers_done(end, 0.0))
    sent += frames(core.on_batch_done(step_result(batch), 0.0))
    assert Counter(part for frame in sent for part in parts(frame)) == Counter(
        {(2, 0): 1, (2, 1): 1}
    )


def check_nothing_is_left(core: PrefillCore) -> None:
    core.check_integrity()
    assert core.is_idle
    assert core.pool.num_available == core.pool.num_pages
