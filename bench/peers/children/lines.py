"""The child's end of `harness.pipe_endpoint`: requests in, tokens per step out.

Only the standard library: it runs in the environment of any peer. The standard output belongs to
the protocol, so whatever a library prints goes to the standard error.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BURST_S = 0.005  # within which requests that were sent together have all arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRequest:
    """One prompt to continue."""

    id: int
    prompt: list[int]
    max_tokens: int


class Lines:
    """The connection to the load generator."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._arrived: queue.Queue[LineRequest | None] = queue.Queue()  # None: end of the input
        self._ended = False

    def ready(self) -> None:
        """Say that the model is loaded, and begin to read."""
        threading.Thread(target=self._read, daemon=True).start()
        self._write({"ready": True})

    def next(self) -> LineRequest | None:
        """Wait for a request; None when there will be no more."""
        return None if self._ended else self._note_end(self._arrived.get())

    def poll(self) -> list[LineRequest]:
        """Requests that are there already."""
        requests = []
        while not self._ended and not self._arrived.empty():
            if request := self._note_end(self._arrived.get()):
                requests.append(request)
        return requests

    def next_burst(self) -> list[LineRequest]:
        """Wait for a request and take all that were sent with it; empty at the end."""
        first = self.next()
        if first is None:
            return []
        time.sleep(BURST_S)
        return [first, *self.poll()]

    def step(self, tokens: Mapping[int, int], done: Sequence[int]) -> None:
        """Report one step: new tokens by request, and the requests that are complete."""
        self._write({"tokens": {str(key): count for key, count in tokens.items()}, "done": done})

    def _note_end(self, request: LineRequest | None) -> LineRequest | None:
        self._ended = request is None
        return request

    def _read(self) -> None:
        for line in sys.stdin:
            self._arrived.put(LineRequest(**json.loads(line)))
        self._arrived.put(None)

    def _write(self, value: Mapping[str, object]) -> None:
        self._out.write(json.dumps(value) + "\n")
