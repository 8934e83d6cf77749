"""The first request of an instance: one prompt, through both kinds of worker, over its own API."""

import json

import httpx

from pagewire.cluster.errors import StartError

_TIMEOUT_S = 60.0
# Token 0 comes from the prefill worker, token 1 shows that the pages have reached a decode worker.
_NUM_TOKENS = 2


async def self_test(url: str) -> None:
    """Returns when both tokens have come. Raises StartError with what the server said instead."""
    body = {
        "model": "default",
        "prompt": "The capital of France is",
        "max_tokens": _NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    try:
        # No proxy of the environment: the server is in this process.
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
            response = await client.post(f"{url}/v1/completions", json=body)
    except httpx.HTTPError as error:
        raise StartError(f"the first prompt got no answer: {error!r}") from error
    if response.status_code != httpx.codes.OK:
        raise StartError(f"the first prompt failed: {_message(response)}")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"
