"""The whole product: its command line, Ray, processes and HTTP, with the default model.

One instance serves all tests of this file, in their order; the last one stops it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import psutil
import pytest

START_TIMEOUT_S = 180
RESTART_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
PAGEWIRE = Path(sys.executable).with_name("pagewire")
QUESTION = "What is the capital of France?"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running `pagewire serve`."""

    process: subprocess.Popen[bytes]
    output: Path
    temporary: Path  # its TMPDIR
    shared_memory: frozenset[str]  # files in /dev/shm before it was started

    @property
    def url(self) -> str:
        return self.line("  API ").split()[-1].removesuffix("/v1")

    def line(self, start: str) -> str:
        """The line of the output that begins so; empty when there is none yet."""
        lines = self.output.read_text().splitlines()
        return next((line for line in lines if line.startswith(start)), "")

    def workers(self) -> dict[str, dict[str, Any]]:
        body = get(f"{self.url}/admin/workers").json()
        return {worker["name"]: worker for worker in body["workers"]}

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def ask(self) -> str:
        """The answer to a question that the model can answer."""
        with self.client() as client:
            answer = client.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": QUESTION}],
                max_tokens=16,
                temperature=0,
            )
        return answer.choices[0].message.content or ""


def get(url: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=10) as client:
        return client.get(url).raise_for_status()


def wait_for(found: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """Poll until `found` returns something."""
    deadline = time.monotonic() + timeout_s
    while (result := found()) is None:
        assert time.monotonic() < deadline, f"no {what} after {timeout_s} s"
        time.sleep(0.05)
    return result


def shared_memory() -> frozenset[str]:
    return frozenset(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else frozenset()


@contextmanager
def counting(server: Server, max_tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a long answer, the usage at its end; silences are bounded."""
    body = {
        "model": "default",
        "prompt": "Count: one, two, three,",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with (
        httpx.Client(trust_env=False, timeout=RESTART_TIMEOUT_S) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


def start(directory: Path, *arguments: str, failpoint: str | None = None) -> Server:
    """Start an instance on free ports, and wait until it says that it is ready."""
    output, temporary = directory / "output", directory / "tmp"
    temporary.mkdir()
    before = shared_memory()
    environment = {name: each for name, each in os.environ.items() if "PAGEWIRE" not in name}
    failpoints = {"PAGEWIRE_FAILPOINT": failpoint} if failpoint else {}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [PAGEWIRE, "serve", "--port", "0", "--dashboard-port", "0", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment | {"TMPDIR": str(temporary)} | failpoints,
        )
    server = Server(process=process, output=output, temporary=temporary, shared_memory=before)

    def is_ready() -> bool | None:
        assert process.poll() is None, output.read_text()
        return True if server.line("ready in ") else None

    try:
        wait_for(is_ready, START_TIMEOUT_S, f"banner in {output}")
    except AssertionError:
        stop(server)
        raise
    return server


def stop(server: Server) -> int:
    """Ask an instance to stop, and force it if it does not; returns its exit code."""
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.process.send_signal(signal.SIGTERM)
        return server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(tmp_path_factory.mktemp("serve"), "--dtype", "float32")
    yield running
    if running.process.poll() is None:
        stop(running)


def test_banner_tells_model_workers_and_urls(server: Server) -> None:
    workers = server.workers()
    assert "SmolLM2-135M-Instruct (float32)" in server.line("  model ")
    for name in ("prefill-0", "decode-0"):
        line = server.line(f"  {name} ")
        assert f"pid {workers[name]['pid']}, cpu" in line
        assert f"{workers[name]['pages']['total']} pages of 64 tokens" in line
    assert f"curl {server.url}/v1/chat/completions" in server.line("  try ")
    dashboard = server.line("  Ray ").split()[-1]
    assert get(f"{dashboard}/api/version").json()["ray_version"]


def test_workers_are_named_actors_in_their_own_processes(server: Server) -> None:
    workers = server.workers()
    assert {name: worker["role"] for name, worker in workers.items()} == {
        "prefill-0": "prefill",
        "decode-0": "decode",
    }
    pids = {worker["pid"] for worker in workers.values()}
    assert len(pids) == 2
    assert server.process.pid not in pids
    dashboard = server.line("  Ray ").split()[-1]
    actors = get(f"{dashboard}/api/v0/actors").json()["data"]["result"]["result"]
    assert {actor["name"]: actor["pid"] for actor in actors} == {
        name: worker["pid"] for name, worker in workers.items()
    }


def test_answer_goes_through_both_workers(server: Server) -> None:
    before = server.workers()
    assert "Paris" in server.ask()
    after = server.workers()
    assert after["prefill-0"]["prompt_tokens"] > before["prefill-0"]["prompt_tokens"]
    assert after["decode-0"]["generated_tokens"] > before["decode-0"]["generated_tokens"]
    received = sum(each["bytes_received"] for each in after["decode-0"]["transfers"])
    assert received > sum(each["bytes_received"] for each in before["decode-0"]["transfers"])


def test_several_choices_are_prefilled_once(server: Server) -> None:
    before = server.workers()["prefill-0"]["prompt_tokens"]
    with server.client() as client:
        stream = client.completions.create(
            model="default",
            prompt="Three colours of the rainbow are",
            n=3,
            max_tokens=24,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
    texts = ["", "", ""]
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert len(set(texts)) == 3
    assert last.usage is not None and last.usage.completion_tokens <= 3 * 24
    assert server.workers()["prefill-0"]["prompt_tokens"] - before == last.usage.prompt_tokens


def test_the_printed_curl_line_answers(server: Server) -> None:
    command, url, *_, body = shlex.split(server.line("  try ").removeprefix("  try "))
    assert command == "curl"
    with httpx.Client(trust_env=False, timeout=60) as client:
        answer = client.post(url, content=body, headers={"Content-Type": "application/json"})
    assert "Paris" in answer.raise_for_status().json()["choices"][0]["message"]["content"]


def test_chat_command_streams_and_measures(server: Server) -> None:
    result = subprocess.run(
        [PAGEWIRE, "chat", QUESTION, "--url", server.url, "--max-tokens", "16"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0
    assert "Paris" in result.stdout
    assert "TTFT" in result.stderr
    assert "tokens/s" in result.stderr


def test_a_stream_goes_on_when_its_worker_was_killed_and_comes_back(server: Server) -> None:
    killed = server.workers()["decode-0"]
    with counting(server, max_tokens=200) as events:
        assert "error" not in next(events)
        os.kill(killed["pid"], signal.SIGKILL)
        *_, last = events
    assert last["usage"]["completion_tokens"] == 200
    assert server.workers()["decode-0"]["pid"] != killed["pid"]
    assert "Paris" in server.ask()
    assert "decode-0 ended: its process was killed or crashed" in server.output.read_text()


def test_termination_leaves_nothing(server: Server) -> None:
    parent = psutil.Process(server.process.pid)
    tree = {parent, *parent.children(recursive=True)}
    assert stop(server) == 0
    alive = {each for each in tree if each.is_running() and each.status() != "zombie"}
    assert not alive
    assert not set(Path("/tmp").glob(f"pagewire-{server.process.pid}-*"))
    assert not list(server.temporary.iterdir())
    assert not shared_memory() - server.shared_memory
    assert not sysv_segments({each.pid for each in tree})


def sysv_segments(creators: set[int]) -> list[str]:
    """System V shared memory of these processes, which outlives them unless it is removed."""
    table = Path("/proc/sysvipc/shm")
    if not table.exists():
        return []
    header, *rows = table.read_text().splitlines()
    column = header.split().index("cpid")
    return [row for row in rows if int(row.split()[column]) in creators]


@pytest.fixture(scope="module")
def larger_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers of each kind, without Ray; one dies at the first frame that it gets."""
    running = start(
        tmp_path_factory.mktemp("larger"),
        *("--launcher", "subprocess", "--transport", "tcp", "--dtype", "float32"),
        *("--prefill", "2", "--decode", "2", "--num-pages", "64", "--served-model", "small"),
        *("--hang-timeout-s", "3"),
        failpoint="decode-1:Frame:1",
    )
    yield running
    if running.process.poll() is None:
        stop(running)


def test_number_of_workers_transport_and_launcher_can_be_chosen(larger_server: Server) -> None:
    workers = larger_server.workers()
    assert sorted(workers) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    assert {each["kind"] for each in workers["decode-0"]["transfers"]} == {"tcp"}
    assert {worker["pages"]["total"] for worker in workers.values()} == {64}
    assert get(f"{larger_server.url}/v1/models").json()["data"][0]["id"] == "small"
    assert "Paris" in larger_server.ask()


def test_a_decode_worker_that_dies_in_a_handoff_costs_no_second_prefill(
    larger_server: Server,
) -> None:
    prompt = "The river rises in the hills, " * 40

    def num_computed() -> int:
        workers = larger_server.workers()
        return sum(workers[name]["prompt_tokens"] for name in ("prefill-0", "prefill-1"))

    def complete() -> tuple[str, int]:
        with larger_server.client() as client:
            answer = client.completions.create(
                model="default", prompt=prompt, max_tokens=12, temperature=0
            )
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.prompt_tokens

    with counting(larger_server, max_tokens=1000) as events:
        next(events)  # decode-0 is at work: what comes next goes to decode-1
        killed, before = larger_server.workers()["decode-1"], num_computed()
        text, num_tokens = complete()
        assert num_computed() - before == num_tokens

    def new_worker() -> dict[str, Any] | None:
        worker = larger_server.workers().get("decode-1")
        return worker if worker and worker["incarnation"] != killed["incarnation"] else None

    wait_for(new_worker, RESTART_TIMEOUT_S, "new decode-1")
    assert complete()[0] == text


def test_a_worker_that_hangs_is_replaced(larger_server: Server) -> None:
    hung = larger_server.workers()["decode-0"]
    os.kill(hung["pid"], signal.SIGSTOP)

    def successor() -> dict[str, Any] | None:
        worker = larger_server.workers().get("decode-0")
        return worker if worker and worker["pid"] != hung["pid"] else None

    assert wait_for(successor, RESTART_TIMEOUT_S, "new decode-0")
    assert not psutil.pid_exists(hung["pid"])
    assert "Paris" in larger_server.ask()


def test_workers_end_with_an_instance_that_is_killed(larger_server: Server) -> None:
    workers = {psutil.Process(each["pid"]) for each in larger_server.workers().values()}
    larger_server.process.kill()
    larger_server.process.wait()
    _, alive = psutil.wait_procs(workers, timeout=STOP_TIMEOUT_S)
    assert not alive
