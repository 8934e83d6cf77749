from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from scripted_dispatcher import ScriptedDispatcher, updates

from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import FinishReason, RequestFailed, WorkerView

PREFILL = WorkerView(
    name="prefill-0",
    role="prefill",
    pid=11,
    incarnation="ab" * 16,
    device="cpu",
    is_responding=True,
    address="127.0.0.1:1",
    state=pb.WorkerState(
        pages=pb.PageCounts(free=3, pinned=1, total=4),
        queued=2,
        queued_tokens=99,
        parked_pages=5,
        transfers=[
            pb.TransferTotals(kind="tcp", bytes_sent=1000, send_seconds=0.5, failures=1, trips=2),
        ],
        links=[
            pb.KvLink(
                peer=bytes.fromhex("cd" * 16),
                transport="tcp",
                given_up=[pb.GivenUp(transport="ucx", cause="stalled", retry_in_s=4.5)],
            ),
            pb.KvLink(peer=bytes.fromhex("ef" * 16), transport="tcp"),  # of a worker that has gone
        ],
    ),
)
DECODE = WorkerView(
    name="decode-0",
    role="decode",
    pid=12,
    incarnation="cd" * 16,
    device="cpu",
    is_responding=True,
    address="127.0.0.1:2",
    state=pb.WorkerState(
        pages=pb.PageCounts(free=4, cached=2, owned=1, quarantined=1, total=8),
        running=3,
        step_s=0.25,
        handoffs=1,
        generated_tokens=7,
        drafted_tokens=5,
        accepted_tokens=4,
        transfers=[pb.TransferTotals(kind="tcp", bytes_received=900, receive_seconds=0.25)],
    ),
)


def scrape(client: TestClient) -> dict[str, float]:
    """Samples by name and labels, as they are written."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


def test_health_does_not_depend_on_workers(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.unready = RequestFailed("", status=503, kind="", code="")
    assert client.get("/health").status_code == 200


def test_ready_says_what_is_missing(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    assert client.get("/ready").status_code == 200
    dispatcher.unready = RequestFailed(
        "No decode worker is registered.",
        status=503,
        kind="service_unavailable",
        code="no_workers",
        retry_after_s=1,
    )
    response = client.get("/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["message"] == "No decode worker is registered."


def test_the_workers(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    dispatcher.workers = [DECODE, PREFILL]
    decode, prefill = client.get("/admin/workers").json()["workers"]
    assert decode == {
        "name": "decode-0",
        "role": "decode",
        "pid": 12,
        "incarnation": "cd" * 16,
        "device": "cpu",
        "is_responding": True,
        "integrity_error": None,
        "address": "127.0.0.1:2",
        "pages": {
            "free": 4,
            "owned": 1,
            "pinned": 0,
            "quarantined": 1,
            "total": 8,
            "cached": 2,
        },
        "queued": 0,
        "running": 3,
        "step_s": 0.25,
        "handoffs": 1,
        "parked_pages": 0,
        "queued_tokens": 0,
        "prompt_tokens": 0,
        "generated_tokens": 7,
        "drafted_tokens": 5,
        "accepted_tokens": 4,
        "dropped_messages": 0,
        "transfers": [
            {
                "kind": "tcp",
                "bytes_sent": 0,
                "bytes_received": 900,
                "send_seconds": 0.0,
                "receive_seconds": 0.25,
                "failures": 0,
                "trips": 0,
            }
        ],
        "links": [],
    }
    assert prefill["name"] == "prefill-0"
    assert prefill["links"][0] == {
        "peer": "cd" * 16,
        "transport": "tcp",
        "given_up": [{"transport": "ucx", "cause": "stalled", "retry_in_s": 4.5}],
    }


@pytest.mark.parametrize("name", ["smollm2", "default"])
def test_the_model_by_each_of_its_names(client: TestClient, name: str) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "smollm2"
    assert card["object"] == "model"
    assert card["max_model_len"] == 2048
    assert client.get(f"/v1/models/{name}").json() == card


def test_the_version(client: TestClient) -> None:
    assert set(client.get("/version").json()) == {"version"}


def test_the_description_of_the_api_resolves(client: TestClient) -> None:
    description = client.get("/openapi.json").json()

    def check(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                target: Any = description
                for part in node["$ref"].removeprefix("#/").split("/"):
                    target = target[part.replace("~1", "/").replace("~0", "~")]
            for each in node.values():
                check(each)
        elif isinstance(node, list):
            for each in node:
                check(each)

    check(description)
    chat = description["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert "messages" in chat["content"]["application/json"]["schema"]["properties"]


# --- metrics ------------------------------------------------------------------------------------


def test_requests_are_counted_under_both_names(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    body = {"model": "default", "prompt": [5, 6, 7]}
    dispatcher.script = updates([40, 41, 2], FinishReason.STOP)
    client.post("/v1/completions", json=body)
    dispatcher.script = updates([40, 41])
    client.post("/v1/completions", json=body | {"stream": True})
    dispatcher.script = [ZeroDivisionError()]
    client.post("/v1/completions", json=body)
    client.post("/v1/completions", json={})
    client.get("/made/up/by/a/client")
    samples = scrape(client)
    for reason in ("stop", "length", "error"):
        labels = f"{{finished_reason={reason},model_name=smollm2}}"
        assert samples[f"pagewire_requests_finished_total{labels}"] == 1
        assert samples[f"vllm:request_success_total{labels}"] == 1
    labels = "{model_name=smollm2}"
    for prefix in ("pagewire_", "vllm:"):
        assert samples[f"{prefix}prompt_tokens_total{labels}"] == 9
        assert samples[f"{prefix}generation_tokens_total{labels}"] == 5
        assert samples[f"{prefix}time_to_first_token_seconds_count{labels}"] == 2
        assert samples[f"{prefix}inter_token_latency_seconds_count{labels}"] == 3
        assert samples[f"{prefix}request_prompt_tokens_sum{labels}"] == 9
        assert samples[f"{prefix}time_to_first_token_seconds_bucket{{le=+Inf,{labels[1:]}"] == 2
    assert samples[f"vllm:e2e_request_latency_seconds_count{labels}"] == 3
    assert samples[f"vllm:request_time_per_output_token_seconds_count{labels}"] == 2
    endpoint = "endpoint=/v1/completions"
    assert samples[f"pagewire_http_responses_total{{{endpoint},status=200}}"] == 2
    assert samples[f"pagewire_http_responses_total{{{endpoint},status=400}}"] == 1
    assert samples[f"pagewire_http_responses_total{{{endpoint},status=500}}"] == 1
    assert samples["pagewire_http_responses_total{endpoint=unknown,status=404}"] == 1


def test_gauges_come_from_the_dispatcher(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.states = {"queued": 4, "prefilling": 1, "handoff": 2, "decoding": 3}
    dispatcher.num_retries = {"dispatch": 2, "repoint": 6}
    dispatcher.workers = [DECODE, PREFILL]
    samples = scrape(client)
    assert samples["pagewire_retries_total{kind=repoint,model_name=smollm2}"] == 6
    labels = "{model_name=smollm2}"
    assert samples[f"vllm:num_requests_waiting{labels}"] == 4
    assert samples[f"vllm:num_requests_running{labels}"] == 6
    assert samples[f"vllm:kv_cache_usage_perc{labels}"] == 0.25
    assert samples["pagewire_requests{model_name=smollm2,state=handoff}"] == 2
    decode = "role=decode,worker=decode-0"
    assert samples["pagewire_worker_pages{role=decode,state=quarantined,worker=decode-0}"] == 1
    assert samples[f"pagewire_worker_up{{{decode}}}"] == 1
    assert samples[f"pagewire_worker_running{{{decode}}}"] == 3
    assert samples[f"pagewire_worker_generated_tokens_total{{{decode}}}"] == 7
    assert samples[f"pagewire_worker_drafted_tokens_total{{{decode}}}"] == 5
    assert samples[f"pagewire_worker_accepted_tokens_total{{{decode}}}"] == 4
    assert samples[f"vllm:spec_decode_num_accepted_tokens_total{{{decode}}}"] == 4
    assert samples["pagewire_worker_queued_tokens{role=prefill,worker=prefill-0}"] == 99
    assert samples["pagewire_worker_parked_pages{role=prefill,worker=prefill-0}"] == 5
    sent = "{direction=sent,transport=tcp,worker=prefill-0}"
    assert samples[f"pagewire_kv_transfer_bytes_total{sent}"] == 1000
    assert samples[f"pagewire_kv_transfer_seconds_total{sent}"] == 0.5
    assert samples["pagewire_kv_transfer_failures_total{transport=tcp,worker=prefill-0}"] == 1
    assert samples["pagewire_kv_transport_trips_total{transport=tcp,worker=prefill-0}"] == 2
    link = "peer=decode-0,transport={},worker=prefill-0"
    links = {name: value for name, value in samples.items() if "pagewire_kv_link" in name}
    assert links == {
        f"pagewire_kv_link{{{link.format('tcp')}}}": 1,
        f"pagewire_kv_link{{{link.format('ucx')}}}": 0,
    }


def test_a_worker_that_is_gone_leaves_no_series(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.workers = [DECODE]
    assert any("decode-0" in name for name in scrape(client))
    dispatcher.workers = []
    samples = scrape(client)
    assert not any("decode-0" in name for name in samples)
    assert samples["vllm:kv_cache_usage_perc{model_name=smollm2}"] == 0


def test_no_prompt_reaches_metrics_or_logs(
    client: TestClient, dispatcher: ScriptedDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "xyzzy-canary"
    dispatcher.script = [ZeroDivisionError()]
    for stream in (False, True):
        for body in (
            {"model": "default", "prompt": canary},
            {"model": "default", "messages": [{"role": "user", "content": canary}]},
            {"model": canary, "prompt": canary, "messages": canary},
        ):
            for path in ("/v1/completions", "/v1/chat/completions"):
                response = client.post(path, json=body | {"stream": stream})
                assert canary not in response.text
    assert canary not in client.get("/metrics").text
    assert canary not in caplog.text
