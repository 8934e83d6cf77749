"""What torch is asked about GPUs, with its answers replaced by those of a machine that has some."""

from types import SimpleNamespace

import pytest
import torch

from pagewire.cluster.gpu_inventory import TorchCuda
from pagewire.cluster.torch_cuda import inspect_torch_cuda
from pagewire.engine import load


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    selected = SimpleNamespace(explanation="Triton on a GPU", remedy="")
    monkeypatch.setattr(load, "select_kernels", lambda kernels, device: selected)


def test_a_torch_for_the_cpu_can_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert inspect_torch_cuda() == TorchCuda()


def test_versions_and_kernels_are_reported(gpus: None) -> None:
    assert inspect_torch_cuda() == TorchCuda(
        cuda="13.0", num_gpus=2, nccl="2.29.7", kernels="Triton on a GPU"
    )


def test_without_a_usable_gpu_nothing_is_said_of_kernels(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inspect_torch_cuda() == TorchCuda(cuda="13.0", nccl="2.29.7")


def test_a_torch_without_nccl_has_no_version_of_it(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert inspect_torch_cuda().nccl is None
