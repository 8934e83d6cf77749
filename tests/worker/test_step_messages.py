"""What rank 0 tells other ranks arrives as it was, or is refused."""

import socket
import struct

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unread_device import DEVICE, unread_device

from pagewire.engine.batch import BatchRow, PageCopy
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.step_inputs import InputLimits, prepare
from pagewire.engine.step_memory import StepInputs, StepMemory
from pagewire.worker.step_messages import (
    Copies,
    Message,
    Step,
    StepMessageError,
    WarmUp,
    decode,
    receive,
)

LIMITS = InputLimits(vocab_size=100, num_pages=50, page_size=16, max_model_len=200)


def memory() -> StepMemory:
    return StepMemory(torch.device("cpu"))


def sent(message: Message) -> Message:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.sendall(message.encode())
        return decode(receive(theirs))


rows = st.builds(
    lambda length, start, page, sampling: BatchRow(
        request_id="",
        token_ids=range(length),
        start=start,
        page_table=range(page, page + 8),
        sampling=sampling,
    ),
    length=st.integers(1, 20),
    start=st.integers(0, 100),
    page=st.integers(0, 40),
    sampling=st.sampled_from([SamplingParams(), None]),
)


@given(
    rows=st.lists(rows, min_size=1, max_size=4),
    num_threads=st.integers(1, 64),
    by_layer=st.booleans(),
    is_fed=st.booleans(),
)
def test_a_step_has_the_inputs_that_rank_0_has(
    rows: list[BatchRow], num_threads: int, by_layer: bool, is_fed: bool
) -> None:
    arrays = prepare(rows, LIMITS, memory())
    inputs = arrays.inputs()
    step = Step.of(arrays, num_threads=num_threads, by_layer=by_layer, is_fed=is_fed)
    message = sent(step)
    assert isinstance(message, Step)
    assert message.num_threads == num_threads
    assert (message.by_layer, message.is_fed) == (by_layer, is_fed)
    found = message.inputs(memory())
    for mine, theirs in zip(tensors(inputs), tensors(found), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert found.attention.page_size == inputs.attention.page_size


def test_a_device_is_not_asked_for_what_the_host_has_told_it() -> None:
    """It would have to end the step before."""
    row = BatchRow(request_id="", token_ids=[1], start=0, page_table=[3], sampling=SamplingParams())
    with unread_device() as device:
        arrays = prepare([row], LIMITS, StepMemory(torch.device(DEVICE)))
        arrays.inputs()
        message = Step.of(arrays, num_threads=1, by_layer=False, is_fed=False)
        assert device.num_reads == 0
    assert message.inputs(memory()).token_ids.tolist() == [1]


def tensors(inputs: StepInputs) -> list[torch.Tensor]:
    batch = inputs.attention
    return [
        inputs.token_ids,
        inputs.logits_of,
        batch.cu_seqlens,
        batch.context_lens,
        batch.page_table,
        batch.positions,
        batch.slots,
    ]


@pytest.mark.parametrize(
    "message", [Copies(copies=(PageCopy(3, 4), PageCopy(4, 1000))), WarmUp(max_rows=256)]
)
def test_other_messages(message: Message) -> None:
    assert sent(message) == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        msgpack.packb(7),
        msgpack.packb([]),
        msgpack.packb([9]),
        msgpack.packb([1, [3]]),
        msgpack.packb([2, 1, 1, 1]),
        msgpack.packb([3]),
        msgpack.packb([3, 1, 1]),
        msgpack.packb([1, {}]),
        msgpack.packb([1, msgpack.ExtType(1, b"x")]),
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(StepMessageError):
        decode(body)


def test_a_message_that_is_too_long_is_not_received() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.sendall(struct.pack("!I", 2**31))
        with pytest.raises(StepMessageError, match="2147483648 bytes"):
            receive(theirs)


def test_the_end_in_the_middle_of_a_message_is_noticed() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.sendall(Copies(copies=(PageCopy(1, 2),)).encode()[:-1])
        mine.close()
        with pytest.raises(ConnectionResetError):
            receive(theirs)
