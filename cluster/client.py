"""A client of a running server: streams answers, and measures them."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pagewire.cluster.errors import RequestError

Message = Mapping[str, str]  # role and content

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 120.0  # the longest silence; a server that waits sends keep-alives


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStats:
    """How fast an answer came."""

    ttft_s: float  # to the first piece of text
    num_tokens: int
    seconds: float  # to the end

    @property
    def tokens_per_s(self) -> float:
        """After the first token; 0 for an answer of one."""
        decode_s = self.seconds - self.ttft_s
        return (self.num_tokens - 1) / decode_s if decode_s > 0 and self.num_tokens > 1 else 0.0


def stream_chat(
    url: str, messages: Sequence[Message], *, model: str, max_tokens: int | None, temperature: float
) -> Iterator[str | AnswerStats]:
    """The answer of the server at `url`, piece by piece, and its statistics as the last item.

    Raises RequestError when nothing listens there, when the server refuses the request, and when
    the answer breaks off.
    """
    body = {
        "model": model,
        "messages": list(messages),
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    start = time.monotonic()
    first: float | None = None
    num_tokens = 0
    try:
        for event in _events(f"{url}/v1/chat/completions", body):
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.monotonic()
                    yield text
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    except httpx.ConnectError as error:
        raise RequestError(
            f"nothing listens at {url}; start a server with `pagewire serve`, or name it with --url"
        ) from error
    except json.JSONDecodeError as error:
        raise RequestError(f"what {url} answers is no stream of the OpenAI API") from error
    except ValueError as error:  # what JSON or UTF-8 cannot say
        raise RequestError(f"the request cannot be sent: {error}") from error
    except httpx.HTTPError as error:
        raise RequestError(f"the connection to {url} broke: {error}") from error
    end = time.monotonic()
    yield AnswerStats(ttft_s=(first or end) - start, num_tokens=num_tokens, seconds=end - start)


def _events(url: str, body: Mapping[str, object]) -> Iterator[dict[str, Any]]:
    timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    # No proxy of the environment: a server is on this machine or in its own network.
    with httpx.stream("POST", url, json=body, timeout=timeout, trust_env=False) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
            raise RequestError(_message(response))
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:"):
                continue
            if data == "[DONE]":
                return
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise RequestError(str(event["error"]["message"]))
            yield event
    raise RequestError("the answer broke off before its end")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"the server answered with HTTP status {response.status_code}"
