"""An OpenAI-compatible server as an Endpoint.

Prompts go out as token ids, so that every engine gets exactly the same number of them.
"""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import httpx

from harness.sse import parse_line
from harness.streams import StreamError, StreamTimes

GREEDY: Mapping[str, object] = {"temperature": 0}
READ_TIMEOUT_S = 300.0  # the longest silence: a queue of long prompts on a slow machine


class HttpEndpoint:
    """Implements `harness.streams.Endpoint` over /v1/completions."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, sampling: Mapping[str, object] = GREEDY
    ) -> None:
        """`sampling`: fields of the request that say how tokens are chosen."""
        self._client = client
        self._model = model
        self._sampling = sampling

    async def stream(self, prompt: Sequence[int], max_tokens: int) -> StreamTimes:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        try:
            return await self._stream(body, max_tokens)
        except httpx.HTTPError as error:
            raise StreamError(f"the connection broke: {type(error).__name__} {error}") from error

    async def _stream(self, body: dict[str, object], max_tokens: int) -> StreamTimes:
        arrivals: list[float] = []
        num_tokens: int | None = None
        sent = time.perf_counter()
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise StreamError(f"HTTP status {response.status_code}: {text[:500]}")
            async for line in response.aiter_lines():
                event = parse_line(line)
                if event is None:
                    continue
                if event.has_text:
                    arrivals.append(time.perf_counter())
                num_tokens = event.num_tokens or num_tokens
        if num_tokens != max_tokens:
            raise StreamError(f"the stream has {num_tokens} tokens; {max_tokens} were asked for")
        return StreamTimes(sent=sent, arrivals=tuple(arrivals), num_tokens=num_tokens)


@asynccontextmanager
async def open_http_endpoint(
    url: str, model: str, *, sampling: Mapping[str, object] = GREEDY
) -> AsyncIterator[HttpEndpoint]:
    """The server at `url`, with connections that are kept between requests."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(READ_TIMEOUT_S, pool=None)
    # No proxy of the environment: the server is on this machine.
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        yield HttpEndpoint(client, model, sampling)
