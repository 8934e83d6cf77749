"""The command line as a program: its exit codes and what it says."""

import inspect
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pagewire
from pagewire import cli
from pagewire.cluster.config import ServeConfig

TIMEOUT_S = 60


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: each for name, each in os.environ.items() if "PAGEWIRE" not in name}
    return subprocess.run(
        [sys.executable, "-m", "pagewire.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment | variables | {"COLUMNS": "200"},
    )


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"pagewire {pagewire.__version__}")


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom pagewire.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'ray', 'grpc', 'fastapi') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "serve" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_every_flag_of_serve_is_a_parameter() -> None:
    flags = set(inspect.signature(cli.serve).parameters) - {"config"}
    assert flags <= set(ServeConfig.model_fields)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--transport", "rdma"), "transport (command line) is 'rdma'"),
        (("serve", "--prefill", "0"), "prefill (command line) is 0"),
        (("serve", "--kernels", "cuda"), "kernels (command line) is 'cuda'"),
        (("serve", "--speculation", "draft"), "error: draft_model: speculation is draft; name"),
        (("serve", "--config", "absent.yaml"), "absent.yaml"),
        (("serve", "--no-such-flag"), "--no-such-flag"),
        (("serve", "--host", "192.0.2.77"), "--host"),
        (("no-such-command",), "no-such-command"),
    ],
)
def test_command_that_is_not_understood_exits_2(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_gpus_that_torch_cannot_use_are_refused_before_anything_starts() -> None:
    result = run("serve", "--device", "cuda", "--port", "0")
    assert result.returncode == 1
    assert "device is cuda, and this torch is built for the CPU only" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_variable_exits_2() -> None:
    result = run("config", "show", PAGEWIRE_PROT="1")
    assert result.returncode == 2
    assert "PAGEWIRE_PORT" in result.stderr


def test_config_show_tells_origins(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("decode: 3\n")
    result = run("config", "show", "--config", str(file), PAGEWIRE_PORT="9000")
    assert result.returncode == 0
    rows = {line.split()[0]: line.split()[1:3] for line in result.stdout.splitlines()}
    assert rows["port"] == ["9000", "PAGEWIRE_PORT"]
    assert rows["decode"] == ["3", str(file)]
    assert rows["prefill"] == ["1", "default"]


@pytest.mark.parametrize("option", ["--port", "--dashboard-port"])
def test_taken_port_exits_1_before_anything_starts(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        free = {"--port": "--dashboard-port", "--dashboard-port": "--port"}[option]
        result = run("serve", option, port, free, "0")
    assert result.returncode == 1
    assert f"port {port}" in result.stderr
    assert option in result.stderr


def test_model_that_does_not_exist_exits_1() -> None:
    result = run("serve", "/no/such/model.gguf", "--port", "0", "--dashboard-port", "0")
    assert result.returncode == 1
    assert "/no/such/model.gguf" in result.stderr
    assert "Traceback" not in result.stderr


def test_worker_that_cannot_start_ends_the_start(tmp_path: Path) -> None:
    arguments = ("--launcher", "subprocess", "--port", "0", "--max-model-len", "999999")
    result = run("serve", *arguments)
    assert result.returncode == 1
    assert "did not start" in result.stderr
    assert "max_model_len" in result.stderr


def test_chat_without_a_server_exits_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = run("chat", "hello", "--url", f"http://127.0.0.1:{port}")
    assert result.returncode == 1
    assert "pagewire serve" in result.stderr
