"""GPUs as the doctor sees them, from an invented driver and an invented torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pynvml
import pytest

from pagewire.cluster.errors import GpuDriverError
from pagewire.cluster.finding import Finding, Status
from pagewire.cluster.gpu_findings import gpu_findings
from pagewire.cluster.gpu_inventory import Gpu, GpuInventory, PeerPath, TorchCuda
from pagewire.cluster.nvml import inspect_gpus

GIB = 1 << 30
H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    memory_total=80 * GIB,
    memory_free=79 * GIB,
    compute_capability=(9, 0),
)
ONE = GpuInventory(driver="580.65.06", cuda=(13, 0), gpus=(H100,), peer_paths={})
PAIR = replace(
    ONE,
    gpus=(H100, H100),
    peer_paths={(0, 1): PeerPath.NVLINK, (1, 0): PeerPath.NVLINK},
)
TORCH = TorchCuda(cuda="13.0", num_gpus=1, nccl="2.29.7", kernels="Triton on NVIDIA H100")
UCX = ("cuda_copy", "cuda_ipc", "tcp")


def findings(
    inventory: GpuInventory | None = ONE,
    torch: TorchCuda = TORCH,
    ucx: tuple[str, ...] = UCX,
    problem: str = "",
) -> Mapping[str, Finding]:
    found = list(gpu_findings(inventory, torch, ucx, driver_problem=problem))
    assert all(bool(each.remedy) == (each.status is not Status.OK) for each in found)
    assert len({each.subject for each in found}) == len(found)
    return {each.subject: each for each in found}


@pytest.mark.parametrize(
    ("inventory", "missing"), [(None, "driver"), (replace(ONE, gpus=()), "GPU")]
)
def test_none_is_one_line_and_no_fault(inventory: GpuInventory | None, missing: str) -> None:
    [only] = findings(inventory, TorchCuda(), ()).values()
    assert only.status is Status.OK
    assert only.detail == f"no NVIDIA {missing}: runs on the CPU"


def test_a_driver_that_does_not_answer_is_told_from_none() -> None:
    [only] = findings(None, TorchCuda(), (), problem="Driver Not Loaded").values()
    assert only.status is Status.WARN
    assert "Driver Not Loaded" in only.detail
    assert "--gpus all" in only.remedy


def test_a_sound_gpu_needs_nothing_and_is_described() -> None:
    found = findings()
    assert {each.status for each in found.values()} == {Status.OK}
    assert found["GPU 0"].detail == (
        "NVIDIA H100 80GB HBM3, 79.0 of 80.0 GiB free, compute capability 9.0"
    )
    assert found["GPU driver"].detail == "580.65.06, runs CUDA up to 13.0"
    assert found["CUDA in torch"].detail == "built for CUDA 13.0, can use 1 of 1 GPUs"
    assert found["NCCL"].detail == "2.29.7"
    assert found["UCX on GPUs"].detail == "cuda_copy, cuda_ipc"
    assert found["GPU kernels"].detail == "Triton on NVIDIA H100"
    assert "GPU peers" not in found


def test_it_says_how_many_are_wanted() -> None:
    assert findings()["GPU"].detail == "1; `pagewire serve` wants one for each rank of a worker"


@pytest.mark.parametrize(
    ("inventory", "torch", "ucx", "subject", "remedy"),
    [
        (
            replace(ONE, gpus=(replace(H100, compute_capability=(7, 5)),)),
            TORCH,
            UCX,
            "GPU 0",
            "8.0",
        ),
        (replace(ONE, cuda=(12, 8)), TORCH, UCX, "GPU driver", "PyTorch's index for cu128"),
        (ONE, TorchCuda(), UCX, "CUDA in torch", "PyTorch's index for cu130"),
        (
            replace(ONE, cuda=(12, 4)),
            TorchCuda(),
            UCX,
            "CUDA in torch",
            "PyTorch's index for cu128",
        ),
        (PAIR, TORCH, UCX, "CUDA in torch", "CUDA_VISIBLE_DEVICES"),
        (ONE, replace(TORCH, nccl=None), UCX, "NCCL", "built for CUDA"),
        (ONE, TORCH, ("tcp",), "UCX on GPUs", "pagewire[cu13]"),
        (ONE, replace(TORCH, kernels_remedy="pip install triton"), UCX, "GPU kernels", "triton"),
    ],
)
def test_what_is_missing_comes_with_its_remedy(
    inventory: GpuInventory, torch: TorchCuda, ucx: tuple[str, ...], subject: str, remedy: str
) -> None:
    found = findings(inventory, torch, ucx)[subject]
    assert found.status is Status.WARN
    assert remedy in found.remedy


def test_a_driver_runs_later_minor_versions_of_its_cuda() -> None:
    torch = replace(TORCH, cuda="12.8")
    assert findings(replace(ONE, cuda=(12, 2)), torch)["GPU driver"].status is Status.OK


def test_a_torch_for_the_cpu_has_no_kernels_to_name() -> None:
    assert "GPU kernels" not in findings(torch=TorchCuda())


def test_memory_shared_with_the_host_is_named_so() -> None:
    gpu = replace(H100, memory_total=None, memory_free=None)
    assert "memory of the host" in findings(replace(ONE, gpus=(gpu,)))["GPU 0"].detail


def test_peers_that_are_all_alike_take_one_line() -> None:
    peers = findings(PAIR, replace(TORCH, num_gpus=2))["GPU peers"]
    assert peers == Finding(subject="GPU peers", status=Status.OK, detail="all over NVLink")


def test_peers_that_differ_are_a_matrix() -> None:
    paths = dict.fromkeys(PAIR.peer_paths, PeerPath.PCIE) | {(1, 0): PeerPath.NONE}
    peers = findings(replace(PAIR, peer_paths=paths), replace(TORCH, num_gpus=2))["GPU peers"]
    assert peers.status is Status.WARN
    assert [line.split() for line in peers.detail.splitlines()] == [
        ["0", "1"],
        ["0", "-", "PCIe"],
        ["1", "none", "-"],
    ]


@dataclass(kw_only=True)
class FakeNvml:
    """The functions of pynvml over two GPUs; NVLink leads from the first to the second only."""

    init_error: pynvml.NVMLError | None = None
    query_error: pynvml.NVMLError | None = None
    unsupported: frozenset[str] = frozenset()
    num_open: int = field(default=0, init=False)

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        if self.query_error is not None:
            raise self.query_error
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle {index}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"GPU of {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self._require("memory")
        return SimpleNamespace(total=80 * GIB, free=79 * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetP2PStatus(self, source: str, target: str, index: int) -> int:
        self._require("peers")
        assert isinstance(index, int)  # the real one would fail
        if index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK and source != "handle 0":
            return int(pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED)
        return int(pynvml.NVML_P2P_STATUS_OK)

    def _require(self, what: str) -> None:
        if what in self.unsupported:
            raise pynvml.NVMLError_NotSupported


def test_the_driver_is_asked_for_everything_and_let_go() -> None:
    nvml = FakeNvml()
    inventory = inspect_gpus(nvml)
    assert inventory is not None
    assert (inventory.driver, inventory.cuda) == ("580.65.06", (12, 8))
    assert inventory.gpus[1] == replace(H100, name="GPU of handle 1")
    assert inventory.peer_paths == {(0, 1): PeerPath.NVLINK, (1, 0): PeerPath.PCIE}
    assert nvml.num_open == 0


def test_what_a_gpu_does_not_have_is_left_open() -> None:
    inventory = inspect_gpus(FakeNvml(unsupported=frozenset({"memory", "peers"})))
    assert inventory is not None
    assert inventory.gpus[0].memory_total is None
    assert set(inventory.peer_paths.values()) == {PeerPath.UNKNOWN}


def test_a_machine_without_a_driver_has_no_inventory() -> None:
    assert inspect_gpus(FakeNvml(init_error=pynvml.NVMLError_LibraryNotFound())) is None


def test_a_driver_that_fails_is_an_error_and_let_go() -> None:
    with pytest.raises(GpuDriverError, match="Driver Not Loaded"):
        inspect_gpus(FakeNvml(init_error=pynvml.NVMLError_DriverNotLoaded()))
    nvml = FakeNvml(query_error=pynvml.NVMLError_GpuIsLost())
    with pytest.raises(GpuDriverError, match="GPU is lost"):
        inspect_gpus(nvml)
    assert nvml.num_open == 0


def test_all_that_a_hand_off_between_gpus_needs_is_told() -> None:
    found = findings(inspect_gpus(FakeNvml()), replace(TORCH, cuda="12.8", num_gpus=2))
    assert {
        subject: found[subject].detail for subject in ("GPU driver", "NCCL", "UCX on GPUs")
    } == {
        "GPU driver": "580.65.06, runs CUDA up to 12.8",
        "NCCL": "2.29.7",
        "UCX on GPUs": "cuda_copy, cuda_ipc",
    }
    assert "79.0 of 80.0 GiB free" in found["GPU 1"].detail
    assert [line.split() for line in found["GPU peers"].detail.splitlines()] == [
        ["0", "1"],
        ["0", "-", "NVLink"],
        ["1", "PCIe", "-"],
    ]
