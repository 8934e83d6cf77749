"""The time ledger: whatever the workers report and however the clocks run, its parts sum up."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from routing import ROUTER, attached, first_token, make_request, ready, sealed, tokens
from scripted_dispatcher import ScriptedDispatcher, events, updates

from pagewire.proto import worker_pb2 as pb
from pagewire.router.commands import Assignment
from pagewire.router.lifecycle import Deliver, Effect, Lifecycle
from pagewire.router.request import TokenUpdate
from pagewire.router.time_ledger import Part, PartTimes, TimeLedger, worker_times

P, D = b"p" * 16, b"d" * 16
REPORTED = [part for part in Part if part not in (Part.PREPROCESS, Part.NETWORK)]
COMPLETIONS = "/v1/completions"
PROTOCOL = Path(__file__).parents[2] / "docs" / "PROTOCOL.md"

seconds = st.floats(0, 1e4)
# Of the processes that report, some may have a bug: what they say must not reach the sums.
claims = st.floats(allow_nan=True, allow_infinity=True) | seconds


@given(
    arrived=seconds,
    gaps=st.lists(seconds, min_size=2, max_size=8),
    reports=st.lists(st.dictionaries(st.sampled_from(REPORTED), claims), max_size=6),
)
def test_parts_are_never_negative_and_sum_to_the_whole(
    arrived: float, gaps: list[float], reports: list[PartTimes]
) -> None:
    ledger = TimeLedger(arrived=arrived)
    now = arrived + gaps[0]
    ledger.submit(now)
    for report, gap in zip(reports, gaps[1:], strict=False):
        now += gap
        ledger.record(report, now)
    end = now + gaps[-1]
    split = ledger.close(end)
    assert split.total_s == pytest.approx(end - arrived)
    assert list(split.parts) == list(Part)
    assert all(each >= 0 for each in split.parts.values())
    assert sum(split.parts.values()) == pytest.approx(split.total_s)


@given(
    lengths=st.dictionaries(st.sampled_from(REPORTED), st.floats(0, 10)),
    ways=st.lists(st.floats(0, 1), min_size=len(REPORTED), max_size=len(REPORTED)),
)
def test_parts_that_follow_each_other_are_as_reported(
    lengths: Mapping[Part, float], ways: list[float]
) -> None:
    """The ways between them are the network's, whatever the clocks of the workers show."""
    ledger = TimeLedger(arrived=100.0)
    ledger.submit(now := 101.0)
    for part, way in zip(REPORTED, ways, strict=True):
        if part is not Part.DECODE:
            now += lengths.get(part, 0.0) + way
            ledger.record({part: lengths.get(part, 0.0)}, now)
    split = ledger.close(now)
    expected = {part: lengths.get(part, 0.0) for part in REPORTED if part is not Part.DECODE}
    found = {part: split.parts[part] for part in expected}
    assert found == pytest.approx(expected, abs=1e-9)
    num_ways = sum(way for part, way in zip(REPORTED, ways, strict=True) if part is not Part.DECODE)
    assert split.parts[Part.NETWORK] == pytest.approx(num_ways, abs=1e-9)
    assert split.parts[Part.PREPROCESS] == pytest.approx(1.0)


def test_everything_after_the_first_step_is_decode() -> None:
    ledger = TimeLedger(arrived=0.0)
    ledger.submit(1.0)
    ledger.record({Part.DECODE: 0.25}, 2.0)
    ledger.record({}, 3.0)
    ledger.record({Part.DECODE: 0.25}, 4.0)
    parts = ledger.close(5.0).parts
    assert (parts[Part.DECODE], parts[Part.NETWORK]) == (3.5, 0.5)


def test_a_clock_that_runs_fast_cannot_make_the_sum_exceed_the_whole() -> None:
    ledger = TimeLedger(arrived=0.0)
    ledger.submit(0.0)
    ledger.record({Part.PREFILL: 1.001}, 1.0)
    split = ledger.close(1.0)
    assert (split.parts[Part.PREFILL], split.parts[Part.NETWORK]) == (1.0, 0.0)


def test_every_part_that_a_worker_can_report_is_known() -> None:
    names = [field.name for field in pb.TimeParts.DESCRIPTOR.fields]
    message = pb.TimeParts(**dict.fromkeys(names, 1.0))
    assert worker_times(message) == dict.fromkeys(REPORTED, 1.0)


# --- From the events of workers to the client -----------------------------------------------------


def delivered(effects: list[Effect]) -> TokenUpdate:
    (effect,) = effects
    assert isinstance(effect, Deliver)
    return effect.update


def test_times_travel_with_the_next_update() -> None:
    lifecycle = Lifecycle(make_request(), ROUTER)
    lifecycle.enqueue(10.0)
    lifecycle.dispatch(Assignment(attempt=1, prefill=P, decode=D, transports=(), ticket=b"t" * 16))
    lifecycle.on_event(attached(D), 10.5)
    lifecycle.on_event(attached(D), 11.0)  # repeated: it waits no more
    event = first_token(P)
    event.first_token.times.CopyFrom(pb.TimeParts(queue_s=0.25, prefill_s=2.0))
    update = delivered(lifecycle.on_event(event, 13.0))
    assert lifecycle.on_event(event, 13.0) == []  # repeated: it adds nothing
    assert update.times == {Part.QUEUE: 0.75, Part.PREFILL: 2.0}

    event = sealed(P)
    event.sealed.times.CopyFrom(pb.TimeParts(grant_wait_s=0.1, gather_s=0.2, wire_s=0.3))
    lifecycle.on_event(event, 13.5)
    event = ready(D)
    event.ready.times.scatter_s = 0.4
    lifecycle.on_event(event, 13.5)
    event = tokens(D, [8], position=1)
    event.tokens.times.CopyFrom(pb.TimeParts(decode_queue_s=0.5, decode_s=0.6))
    update = delivered(lifecycle.on_event(event, 14.0))
    assert update.times == {
        Part.GRANT_WAIT: 0.1,
        Part.GATHER: 0.2,
        Part.WIRE: 0.3,
        Part.SCATTER: 0.4,
        Part.DECODE_QUEUE: 0.5,
        Part.DECODE: 0.6,
    }
    assert delivered(lifecycle.on_event(tokens(D, [9], position=2), 15.0)).times == {}


@pytest.fixture
def timed(dispatcher: ScriptedDispatcher) -> None:
    """The dispatcher's tokens come with times that are far too long for the request."""
    first, *others = updates([5, 6, 7])
    dispatcher.script = [replace(first, times={Part.PREFILL: 1e6}), *others]


def check_ledger(ledger: Any) -> None:
    assert list(ledger["parts_ms"]) == [part.value for part in Part]
    assert sum(ledger["parts_ms"].values()) == pytest.approx(ledger["total_ms"], abs=1e-4)
    assert 0 < ledger["parts_ms"]["prefill"] < ledger["total_ms"]


@pytest.mark.usefixtures("timed")
def test_a_whole_response_has_the_ledger_in_its_usage_and_in_a_header(client: TestClient) -> None:
    body = {"model": "smollm2", "prompt": "Once", "ledger": True}
    response = client.post(COMPLETIONS, json=body)
    ledger = response.json()["usage"]["ledger"]
    check_ledger(ledger)
    entries = [entry.split(";dur=") for entry in response.headers["Server-Timing"].split(", ")]
    shown = {name: float(duration) for name, duration in entries}
    assert shown == {"total": ledger["total_ms"], **ledger["parts_ms"]}


@pytest.mark.usefixtures("timed")
def test_a_stream_has_the_ledger_in_its_last_chunk(client: TestClient) -> None:
    body = {
        "model": "smollm2",
        "prompt": "Once",
        "ledger": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *chunks, last, done = events(client.post(COMPLETIONS, json=body).text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    check_ledger(last["usage"]["ledger"])


@pytest.mark.usefixtures("timed")
def test_nobody_gets_a_ledger_unasked(client: TestClient) -> None:
    for fields in ({}, {"ledger": False}, {"ledger": None}):
        response = client.post(COMPLETIONS, json={"model": "smollm2", "prompt": "Once", **fields})
        assert "ledger" not in response.json()["usage"]
        assert "Server-Timing" not in response.headers


def test_a_stream_without_usage_has_no_place_for_a_ledger(client: TestClient) -> None:
    body = {"model": "smollm2", "prompt": "Once", "ledger": True, "stream": True}
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "ledger"
    assert "stream_options.include_usage" in json.dumps(error)


@pytest.mark.usefixtures("timed")
def test_each_part_is_a_histogram(client: TestClient) -> None:
    client.post(COMPLETIONS, json={"model": "smollm2", "prompt": "Once"})
    page = client.get("/metrics").text
    for part in Part:
        labels = f'{{model_name="smollm2",part="{part.value}"}}'
        assert f"pagewire_request_part_seconds_count{labels} 1.0" in page
    for name in ("queue", "prefill"):
        assert f'vllm:request_{name}_time_seconds_count{{model_name="smollm2"}} 1.0' in page


def test_the_protocol_document_defines_every_part() -> None:
    section = PROTOCOL.read_text(encoding="utf-8").partition("\n## Where the time goes\n")[2]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == [part.value for part in Part]
