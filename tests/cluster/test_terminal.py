"""What `pagewire serve` prints."""

import io
import json
import shlex

import pytest
from rich.console import Console

from pagewire.cluster.terminal import Banner, Terminal, WorkerLine

BANNER = Banner(
    model="SmolLM2-135M-Instruct",
    dtype="bfloat16",
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
        "SmolLM2-135M-Instruct",
        "prefill-0  pid 11, cpu, 100 pages of 64 tokens",
        "decode-0   pid 12, cpu, 200 pages of 128 tokens",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:8265",
        "ready in 9.9 s",
    ):
        assert part in text


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
