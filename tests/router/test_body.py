import asyncio
from collections.abc import Sequence

import pytest
from fastapi import Request
from starlette.types import Message

from pagewire.router.body import read_body
from pagewire.router.errors import ClientGone
from pagewire.router.request import RequestFailed
from pagewire.router.settings import RouterSettings

SETTINGS = RouterSettings(
    served_model="m", max_model_len=10, max_body_bytes=10, body_timeout_s=0.01
)


def read(messages: Sequence[Message], **headers: str) -> bytes:
    remaining = list(messages)

    async def receive() -> Message:
        if not remaining:
            await asyncio.Event().wait()
        return remaining.pop(0)

    headers = {"content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    return asyncio.run(read_body(Request(scope, receive), SETTINGS))


def part(data: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


def test_parts_are_joined() -> None:
    assert read([part(b"01234", more=True), part(b"56789", more=False)]) == b"0123456789"


def test_reading_stops_at_the_limit() -> None:
    with pytest.raises(RequestFailed) as failure:
        read([part(b"01234567890", more=True)])
    assert failure.value.status == 413


def test_an_announced_length_above_the_limit_is_refused_unread() -> None:
    with pytest.raises(RequestFailed) as failure:
        read([], content_length="11")
    assert failure.value.status == 413


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    with pytest.raises(RequestFailed) as failure:
        read([part(b"0", more=True)])
    assert failure.value.status == 408


def test_a_client_that_leaves_in_the_middle_is_gone() -> None:
    with pytest.raises(ClientGone):
        read([part(b"0", more=True), {"type": "http.disconnect"}])
