"""Where workers run: what is asked of GPUs before any worker starts, and what is said."""

import re

import pytest
import torch

from pagewire.cluster import devices
from pagewire.cluster.config import ServeConfig
from pagewire.cluster.devices import DeviceChoice, FoundGpus, choose_device, find_gpus
from pagewire.cluster.errors import GpuDriverError, StartError
from pagewire.cluster.gpu_inventory import Gpu, GpuInventory
from pagewire.engine.device import require_device
from pagewire.engine.errors import DeviceError

H100 = Gpu(name="H100", memory_total=1, memory_free=1, compute_capability=(9, 0))
CPU = DeviceChoice(name="cpu")


def inventory(count: int) -> GpuInventory:
    return GpuInventory(driver="1", cuda=(13, 0), gpus=(H100,) * count, peer_paths={})


def test_without_gpus_auto_is_the_cpu_and_nothing_is_said() -> None:
    assert choose_device(ServeConfig(), FoundGpus()) == CPU


def test_cpu_is_the_cpu_whatever_there_is() -> None:
    assert choose_device(ServeConfig(device="cpu"), FoundGpus(count=8)) == CPU


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_every_worker_has_a_gpu(device: str) -> None:
    config = ServeConfig.model_validate({"device": device, "prefill": 2, "decode": 3})
    assert choose_device(config, FoundGpus(count=5)) == DeviceChoice(name="cuda", num_gpus=5)


def test_every_rank_has_a_gpu() -> None:
    config = ServeConfig(prefill=3, tensor_parallel_size=2, decode_tensor_parallel_size=4)
    assert choose_device(config, FoundGpus(count=10)) == DeviceChoice(name="cuda", num_gpus=10)


@pytest.mark.parametrize(
    ("values", "gpus", "said"),
    [
        ({}, FoundGpus(count=1), "2 workers need 2 GPUs, one each, and torch can use 1"),
        ({"decode": 4}, FoundGpus(count=4), "5 workers need 5 GPUs"),
        ({}, FoundGpus(problem="built for the CPU"), "built for the CPU"),
        ({"kernels": "native"}, FoundGpus(count=2), "kernels is native"),
        ({"quantization": "int4"}, FoundGpus(count=2), "choose w4a16 for GPUs"),
        (
            {"decode": 2, "decode_tensor_parallel_size": 4},
            FoundGpus(count=8),
            "3 workers need 9 GPUs, one for each rank, .* lower prefill, decode or tensor_parallel",
        ),
        (
            {"deterministic": True, "page_size": 64, "decode_page_size": 32},
            FoundGpus(count=2),
            "set decode_page_size to 64",
        ),
    ],
)
def test_what_keeps_workers_from_gpus_is_said_or_an_error(
    values: dict[str, object], gpus: FoundGpus, said: str
) -> None:
    choice = choose_device(ServeConfig.model_validate(values), gpus)
    assert choice.name == "cpu"
    assert re.search(said, choice.reason)
    with pytest.raises(StartError, match=said):
        choose_device(ServeConfig.model_validate(values | {"device": "cuda"}), gpus)


@pytest.mark.parametrize("decode_page_size", [None, 64])
def test_deterministic_runs_on_gpus(decode_page_size: int | None) -> None:
    config = ServeConfig(deterministic=True, page_size=64, decode_page_size=decode_page_size)
    assert choose_device(config, FoundGpus(count=2)) == DeviceChoice(name="cuda", num_gpus=2)


def test_torch_is_asked_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(devices, "inspect_gpus", lambda: None)
    assert find_gpus("auto") == FoundGpus()
    monkeypatch.setattr(devices, "inspect_gpus", lambda: inventory(0))
    assert find_gpus("auto") == FoundGpus()
    monkeypatch.setattr(devices, "inspect_gpus", lambda: inventory(4))
    assert find_gpus("auto") == FoundGpus(count=3)
    assert find_gpus("cuda") == FoundGpus(count=3)
    assert find_gpus("cpu") == FoundGpus()


def test_a_driver_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise GpuDriverError("Driver Not Loaded")

    monkeypatch.setattr(devices, "inspect_gpus", fail)
    assert "Driver Not Loaded" in find_gpus("auto").problem


def test_a_torch_for_the_cpu_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "cu13 or cu12" in find_gpus("cuda").problem
    with pytest.raises(DeviceError, match="cu13 or cu12"):
        require_device("cuda")


def test_no_visible_gpu_is_a_problem_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES" in find_gpus("cuda").problem
    require_device("cpu")
