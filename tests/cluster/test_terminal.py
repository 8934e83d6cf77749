"""What `pagewire serve` prints."""

import io
import json
import shlex
from dataclasses import replace

import pytest
from rich.console import Console

from pagewire.cluster.serve import precision
from pagewire.cluster.terminal import Banner, Terminal, WorkerLine
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.quantization import Quantization
from pagewire.worker.config import Role, WorkerConfig

BANNER = Banner(
    model="SmolLM2-135M-Instruct",
    precision="bfloat16, int8 matrices",
    workers=[
        WorkerLine(name="prefill-0", pid=11, device="cpu", num_pages=100, page_size=64),
        WorkerLine(name="decode-0", pid=12, device="cpu", num_pages=200, page_size=128),
    ],
    transport="ucx, tcp",
    url="http://127.0.0.1:8000",
    dashboard_url="http://127.0.0.1:8265",
    ready_s=9.87,
)


def show(banner: Banner) -> str:
    output = io.StringIO()
    Terminal(Console(file=output, width=40)).show(banner)
    return output.getvalue()


def test_banner_tells_where_everything_is() -> None:
    text = show(BANNER)
    for part in (
        "SmolLM2-135M-Instruct (bfloat16, int8 matrices)",
        "prefill-0  pid 11, cpu, 100 pages of 64 tokens",
        "decode-0   pid 12, cpu, 200 pages of 128 tokens",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:8265",
        "ready in 9.9 s",
    ):
        assert part in text


def test_precision_names_what_is_not_in_the_dtype() -> None:
    plain = WorkerConfig(
        name="prefill-0", role=Role.PREFILL, model="m", served_model="m", routers=("127.0.0.1:1",)
    )
    int8 = replace(plain, quantization=Quantization.INT8)
    assert precision([plain, plain]) == "bfloat16"
    assert precision([int8, int8]) == "bfloat16, int8 matrices"
    int8_kv = replace(int8, kv_cache_dtype=KVCacheDtype.INT8)
    assert precision([int8, int8_kv]) == "bfloat16, int8 matrices, int8 KV cache"


def test_curl_line_can_be_pasted_even_from_a_narrow_terminal() -> None:
    [line] = [each for each in show(BANNER).splitlines() if "curl" in each]
    command = shlex.split(line)
    assert command[1:3] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(command[-1])["messages"][0]["role"] == "user"


def test_steps_are_plain_lines_when_there_is_no_terminal() -> None:
    output = io.StringIO()
    with Terminal(Console(file=output)).step("starting Ray"):
        assert output.getvalue() == "starting Ray …\n"
    assert output.getvalue().splitlines()[-1].startswith("starting Ray: ")
    assert "\x1b" not in output.getvalue()


def test_failed_step_is_not_reported_as_done() -> None:
    output = io.StringIO()
    with pytest.raises(RuntimeError), Terminal(Console(file=output)).step("starting Ray"):
        raise RuntimeError
    assert output.getvalue() == "starting Ray …\n"
