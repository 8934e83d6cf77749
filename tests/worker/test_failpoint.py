"""Failpoints: where they strike, and whom."""

import pytest

from pagewire.kv_transfer.messages import Committed, FrameAck, HandoffId
from pagewire.worker.failpoint import VARIABLE, Failpoint

ID = HandoffId(request_id="request", attempt=1, sender=b"d" * 16, receiver=b"p" * 16)


def test_it_strikes_once_at_the_message_that_was_named() -> None:
    strikes: list[str] = []
    failpoint = Failpoint.of_worker(
        "prefill-0", {VARIABLE: "prefill-0:FrameAck:2"}, lambda: strikes.append("killed")
    )
    assert failpoint is not None
    failpoint.reach(Committed(id=ID))
    failpoint.reach(FrameAck(id=ID, seq=0))
    assert not strikes
    for seq in (1, 2):
        failpoint.reach(FrameAck(id=ID, seq=seq))
        assert strikes == ["killed"]


@pytest.mark.parametrize("environment", [{}, {VARIABLE: "decode-1:Frame:1"}])
def test_other_workers_have_none(environment: dict[str, str]) -> None:
    assert Failpoint.of_worker("decode-0", environment) is None


@pytest.mark.parametrize(
    "value", ["", "decode-0", "decode-0:Frame", "decode-0:Step:1", "d:Frame:0"]
)
def test_one_that_would_never_strike_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"{VARIABLE} is {value}; it must be"):
        Failpoint.of_worker("decode-0", {VARIABLE: value})
