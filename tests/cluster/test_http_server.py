"""The HTTP server in a loop of its owner: when it listens, how it ends."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from pagewire.cluster.errors import StartError
from pagewire.cluster.http_server import HttpServer
from pagewire.cluster.ports import bind
from pagewire.cluster.self_test import self_test


def app() -> FastAPI:
    application = FastAPI()

    @application.get("/ping")
    async def ping() -> str:
        return "pong"

    @application.post("/v1/completions")
    async def completions() -> object:
        return {"choices": []}

    return application


async def fetch(url: str) -> object:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(url)).json()


def test_serves_while_open_and_frees_the_port() -> None:
    async def scenario() -> None:
        with bind("127.0.0.1", 0, option="--port") as listener:
            port = listener.getsockname()[1]
            async with HttpServer(app(), listener, grace_s=1):
                assert await fetch(f"http://127.0.0.1:{port}/ping") == "pong"
        bind("127.0.0.1", port, option="--port").close()

    asyncio.run(scenario())


def test_self_test_passes_when_both_tokens_come() -> None:
    async def scenario() -> None:
        with bind("127.0.0.1", 0, option="--port") as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with HttpServer(app(), listener, grace_s=1):
                await self_test(url)

    asyncio.run(scenario())


def test_self_test_tells_what_the_server_said() -> None:
    async def scenario() -> None:
        with bind("127.0.0.1", 0, option="--port") as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with HttpServer(FastAPI(), listener, grace_s=1):
                with pytest.raises(StartError, match="404"):
                    await self_test(url)
        with pytest.raises(StartError, match="no answer"):
            await self_test(url)

    asyncio.run(scenario())
