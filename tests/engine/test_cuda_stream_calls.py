"""What the stream of copies asks of CUDA, and in which order; torch's streams are stand-ins."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import torch

from pagewire.engine.cuda_copy_stream import CudaCopyStream
from pagewire.engine.cuda_runtime import CudaRuntime

Calls = list[tuple[str, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Of streams and events, each with the stream that it is made in."""
    made: Calls = []
    current = ["steps"]

    class Stream:
        def __init__(self, device: str) -> None:
            made.append(("stream", device))

        cuda_stream = 11

        def __str__(self) -> str:
            return "copies"

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking  # who waits for it shall not keep a core busy
            self.name = ""

        def record(self, stream: object) -> None:
            self.name = f"event of {stream}"
            made.append(("record", str(stream)))

        def wait(self) -> None:
            made.append(("wait", self.name, current[-1]))

        def synchronize(self) -> None:
            made.append(("synchronize", self.name))

    @contextmanager
    def use(stream: object) -> Iterator[None]:
        current.append(str(stream))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    return made


def test_a_copy_begins_behind_the_step_and_the_host_waits_for_the_copy_alone(calls: Calls) -> None:
    copies = CudaCopyStream("cuda")
    computed = copies.mark()
    copied = copies.begin(lambda: calls.append(("work",)), after=computed)
    copied.wait()
    assert calls == [
        ("stream", "cuda"),
        ("record", "steps"),
        ("wait", "event of steps", "copies"),
        ("work",),
        ("record", "copies"),
        ("synchronize", "event of copies"),
    ]


def test_rows_that_lie_apart_are_one_order_in_the_stream_of_copies(calls: Calls) -> None:
    class Runtime:
        def copy_rows(self, *places: int, row_bytes: int, num_rows: int, stream: int) -> None:
            assert places == (into.data_ptr(), 6, source.data_ptr(), 3)
            calls.append(("rows", f"{num_rows} x {row_bytes}", str(stream)))

    copies = CudaCopyStream("cuda", cast(CudaRuntime, Runtime()))
    into = torch.zeros(4, 6, dtype=torch.uint8)[:, :3]
    source = torch.ones(4, 3, dtype=torch.uint8)
    copies.begin(lambda: copies.copy_rows(into, source))
    assert not into.any()
    copies.copy_rows(into[:1], source[:1])  # one behind another: torch's own copy
    assert into[0].all() and not into[1:].any()
    assert calls == [("stream", "cuda"), ("rows", "4 x 3", "11"), ("record", "copies")]


def test_a_copy_into_pages_waits_for_no_step(calls: Calls) -> None:
    CudaCopyStream("cuda").begin(lambda: calls.append(("work",)))
    assert calls == [("stream", "cuda"), ("work",), ("record", "copies")]
