"""Copies between pages and host memory that are made when a test says so: a device's, on a CPU."""

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from fake_device import FakeDeviceMemory, page_sum
from torch import Tensor

from pagewire.engine.copy_stream import Completion

_TIMEOUT_S = 60


class HeldCompletion:
    """Implements Completion; comes when the test lets it."""

    def __init__(self) -> None:
        self._come = threading.Event()

    def come(self) -> None:
        self._come.set()

    def wait(self) -> None:
        assert self._come.wait(_TIMEOUT_S), "nobody lets it come"

    def hold_back(self) -> None:
        assert self._come.is_set(), "a copy was made before what it waits for"


class HeldCopies:
    """Implements CopyStream in the memory of the host.

    Work is done in `release`, in order, or with `is_free` as soon as it is begun.
    """

    def __init__(self, *, is_free: bool = False) -> None:
        self.num_begun = 0
        self.marks: list[HeldCompletion] = []
        self._is_free = is_free
        self._held: deque[tuple[Callable[[], None], Completion | None, HeldCompletion]] = deque()
        self._lock = threading.Lock()
        self._begun = threading.Semaphore(0)
        self._marked = threading.Semaphore(0)

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def device_memory(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def lend(self, data: Tensor) -> FakeDeviceMemory:
        return FakeDeviceMemory(data)

    def copy_rows(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source)

    def prepare_checksums(self) -> None:
        """There is nothing to compile."""

    def begin_checksum(self, data: Tensor, total: Tensor) -> None:
        total.numpy().view(np.uint64)[0] = page_sum(data.numpy().view(np.uint64))

    def mark(self) -> HeldCompletion:
        mark = HeldCompletion()
        with self._lock:
            self.marks.append(mark)
            if self._is_free:
                mark.come()
        self._marked.release()
        return mark

    def begin(self, work: Callable[[], None], *, after: Completion | None = None) -> HeldCompletion:
        done = HeldCompletion()
        with self._lock:
            self.num_begun += 1
            self._held.append((work, after, done))
            if self._is_free:
                self._make()
        self._begun.release()
        return done

    def await_held(self, count: int) -> None:
        """Until so many copies more were begun than the last time."""
        for _ in range(count):
            assert self._begun.acquire(timeout=_TIMEOUT_S), "nobody begins a copy"

    def await_marks(self, count: int) -> None:
        """Until so many marks more were made than the last time."""
        for _ in range(count):
            assert self._marked.acquire(timeout=_TIMEOUT_S), "nobody makes a mark"

    def release(self, count: int | None = None) -> None:
        """Make so many of the copies that were begun, or all."""
        with self._lock:
            self._make(count)

    def free(self) -> None:
        """Let every mark come and make every copy, from now on as soon as it is begun."""
        with self._lock:
            self._is_free = True
            for mark in self.marks:
                mark.come()
            self._make()

    def _make(self, count: int | None = None) -> None:
        for _ in range(len(self._held) if count is None else count):
            work, after, done = self._held.popleft()
            if after is not None:
                after.hold_back()
            work()
            done.come()
