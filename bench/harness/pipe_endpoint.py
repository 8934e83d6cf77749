"""An engine in a child process as an Endpoint: JSON lines over its standard input and output.

A request is `{"id": 7, "prompt": [1, 2], "max_tokens": 64}`. The child writes one line a step,
`{"tokens": {"7": 1}, "done": [7]}`: how many tokens each request got, and which are complete. Its
first line is `{"ready": true}`. `peers/children/lines.py` is the other end.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.process import StartError, running_process
from harness.streams import StreamError, StreamTimes


@dataclass(slots=True, kw_only=True)
class _Request:
    """A request under way."""

    ended: asyncio.Future[None]
    arrivals: list[float] = field(default_factory=list)
    num_tokens: int = 0


class PipeEndpoint:
    """Implements `harness.streams.Endpoint`. Works while `run` does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._requests: dict[str, _Request] = {}
        self._ids = itertools.count()
        self._has_ended = False

    async def stream(self, prompt: Sequence[int], max_tokens: int) -> StreamTimes:
        if self._has_ended:
            raise StreamError("the engine's process has ended")
        request = _Request(ended=asyncio.get_running_loop().create_future())
        request_id = next(self._ids)
        self._requests[str(request_id)] = request
        line = {"id": request_id, "prompt": list(prompt), "max_tokens": max_tokens}
        sent = time.perf_counter()
        self._writer.write(json.dumps(line).encode() + b"\n")
        await request.ended
        if request.num_tokens != max_tokens:
            raise StreamError(
                f"the stream has {request.num_tokens} tokens; {max_tokens} were asked for"
            )
        return StreamTimes(
            sent=sent, arrivals=tuple(request.arrivals), num_tokens=request.num_tokens
        )

    async def run(self) -> None:
        """Hand out what the child writes, until it ends; then all streams under way fail."""
        try:
            while line := await self._reader.readline():
                self._hand_out(json.loads(line), time.perf_counter())
        finally:  # also when a line is none of the protocol: nobody must wait for ever
            self._has_ended = True
            for request in self._requests.values():
                request.ended.set_exception(StreamError("the engine's process ended"))
            self._requests.clear()

    def _hand_out(self, step: Mapping[str, object], now: float) -> None:
        tokens, done = step["tokens"], step["done"]
        assert isinstance(tokens, dict) and isinstance(done, list)
        for request_id, count in tokens.items():
            self._requests[request_id].arrivals.append(now)
            self._requests[request_id].num_tokens += count
        for request_id in done:
            self._requests.pop(str(request_id)).ended.set_result(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A child that is ready."""

    endpoint: PipeEndpoint
    pid: int
    ready_s: float


@asynccontextmanager
async def open_child(
    argv: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    cwd: Path,
    timeout_s: float,
) -> AsyncIterator[Child]:
    """Start a child and wait for its first line. Raises StartError when that does not come."""
    start = time.perf_counter()
    async with running_process(
        argv,
        log=log,
        environment=environment,
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            first = await asyncio.wait_for(process.stdout.readline(), timeout_s)
        except TimeoutError as error:
            raise StartError(f"it was not ready after {timeout_s:.0f} s; see {log}") from error
        if json.loads(first or b"{}") != {"ready": True}:
            raise StartError(f"it ended before it was ready; see {log}")
        endpoint = PipeEndpoint(process.stdout, process.stdin)
        running = asyncio.create_task(endpoint.run())
        try:
            yield Child(endpoint=endpoint, pid=process.pid, ready_s=time.perf_counter() - start)
        finally:
            process.stdin.close()  # the child ends by itself at the end of its input
            running.cancel()
