"""The load generator, against endpoints whose answers the test decides."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from harness.http_endpoint import HttpEndpoint
from harness.load import Arrival, closed_loop, open_loop, steady_prefills
from harness.pipe_endpoint import open_child
from harness.process import StartError
from harness.streams import StreamError, StreamTimes

ECHO = """
import json, sys
print('{"ready": true}', flush=True)
for line in sys.stdin:
    request = json.loads(line)
    for left in range(request["max_tokens"] - 1, -1, -1):
        done = [] if left else [request["id"]]
        print(json.dumps({"tokens": {str(request["id"]): 1}, "done": done}), flush=True)
"""


class CountingEndpoint:
    """Answers after the loop went round once; knows how many it had at the same time."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.running = 0
        self.most = 0

    async def stream(self, prompt: Sequence[int], max_tokens: int) -> StreamTimes:
        self.prompts.append(list(prompt))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if not prompt:
            raise StreamError("an empty prompt")
        return StreamTimes(sent=0.0, arrivals=(1.0,), num_tokens=max_tokens)


def test_a_closed_loop_keeps_its_streams_busy() -> None:
    endpoint = CountingEndpoint()
    prompts = [[index] for index in range(10)]
    streams = asyncio.run(closed_loop(endpoint, prompts, num_streams=4, max_tokens=2))
    assert len(streams) == 10 and endpoint.most == 4
    assert sorted(endpoint.prompts) == prompts


def test_an_open_loop_answers_in_the_order_of_arrival() -> None:
    arrivals = [Arrival(at_s=0.0, prompt=[1], max_tokens=count) for count in (3, 1, 2)]
    streams = asyncio.run(open_loop(CountingEndpoint(), arrivals))
    assert [stream.num_tokens for stream in streams] == [3, 1, 2]


def test_a_failed_stream_fails_the_load() -> None:
    with pytest.raises(StreamError, match="empty"):
        asyncio.run(closed_loop(CountingEndpoint(), [[1], []], num_streams=2, max_tokens=1))


def test_prefills_arrive_one_at_a_time_until_the_block_ends() -> None:
    async def run() -> tuple[int, int]:
        endpoint = CountingEndpoint()
        async with steady_prefills(endpoint, iter([[1]] * 1000), interval_s=0.0) as ended:
            while len(ended) < 3:
                await asyncio.sleep(0)
        return len(ended), endpoint.most

    count, most = asyncio.run(run())
    assert 3 <= count < 1000 and most == 1


def over_http(handler: Callable[[httpx.Request], httpx.Response]) -> StreamTimes:
    async def run() -> StreamTimes:
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await HttpEndpoint(client, "model").stream([1, 2], 2)

    return asyncio.run(run())


def test_a_stream_over_http() -> None:
    lines = [
        'data: {"choices": [{"text": "a"}]}',
        'data: {"choices": [{"text": "b"}]}',
        'data: {"choices": [], "usage": {"completion_tokens": 2}}',
        "data: [DONE]",
    ]
    stream = over_http(lambda request: httpx.Response(200, text="\n\n".join(lines)))
    assert stream.num_tokens == 2 and len(stream.arrivals) == 2


def test_an_output_of_another_length_is_an_error() -> None:
    line = 'data: {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}'
    with pytest.raises(StreamError, match="1 tokens; 2 were asked for"):
        over_http(lambda request: httpx.Response(200, text=line))


def test_a_refusal_is_an_error() -> None:
    with pytest.raises(StreamError, match="429: busy"):
        over_http(lambda request: httpx.Response(429, text="busy"))


def test_an_engine_in_a_child_process(tmp_path: Path) -> None:
    async def run() -> list[StreamTimes]:
        async with open_child(
            [sys.executable, "-c", ECHO],
            log=tmp_path / "log",
            environment={},
            cwd=tmp_path,
            timeout_s=30,
        ) as child:
            return await closed_loop(child.endpoint, [[1]] * 5, num_streams=2, max_tokens=3)

    streams = asyncio.run(run())
    assert [stream.num_tokens for stream in streams] == [3] * 5


def test_a_child_that_ends_at_once_did_not_start(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_child(
            [sys.executable, "-c", ""],
            log=tmp_path / "log",
            environment={},
            cwd=tmp_path,
            timeout_s=30,
        ):
            pass

    with pytest.raises(StartError, match="before it was ready"):
        asyncio.run(run())
