"""What is good and what is missing for the GPUs of a machine: pure, like `doctor`."""

from collections.abc import Iterator

from pagewire.cluster.finding import Finding, Status, judge
from pagewire.cluster.gpu_inventory import Gpu, GpuInventory, PeerPath, TorchCuda

OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16, and the oldest that kernels are compiled for
_UCX_ON_GPUS = ("cuda_copy", "cuda_ipc", "gdr_copy")  # its transports for GPU memory
_TORCH_INSTALL = "install torch>=2.11,<2.14 from PyTorch's index for "
_GIB = 1 << 30


def gpu_findings(
    inventory: GpuInventory | None,
    torch: TorchCuda,
    ucx_transports: tuple[str, ...],
    *,
    driver_problem: str = "",
) -> Iterator[Finding]:
    """One line where there is no GPU. With `driver_problem` the driver did not answer."""
    if driver_problem:
        yield judge(
            "GPU",
            f"the driver does not answer: {driver_problem}",
            sound=False,
            remedy="workers run on the CPU; see nvidia-smi, in a container: docker run --gpus all",
        )
    elif inventory is None or not inventory.gpus:
        # Its absence is no fault: the CPU is a first-class device.
        missing = "driver" if inventory is None else "GPU"
        yield Finding(
            subject="GPU", status=Status.OK, detail=f"no NVIDIA {missing}: runs on the CPU"
        )
    else:
        yield from _with_gpus(inventory, torch, ucx_transports)


def _with_gpus(
    inventory: GpuInventory, torch: TorchCuda, ucx_transports: tuple[str, ...]
) -> Iterator[Finding]:
    yield Finding(
        subject="GPU",
        status=Status.OK,
        detail=f"{len(inventory.gpus)}; `pagewire serve` wants one for each rank of a worker",
    )
    for index, gpu in enumerate(inventory.gpus):
        yield _gpu(index, gpu)
    if len(inventory.gpus) > 1:
        yield _peers(inventory)
    yield _driver(inventory, torch)
    yield _torch(inventory, torch)
    yield judge(
        "NCCL",
        torch.nccl or "not in this torch",
        sound=torch.nccl is not None,
        remedy="a torch built for CUDA brings it; until then no transport nccl",
    )
    yield _ucx(ucx_transports)
    if torch.kernels:
        yield judge(
            "GPU kernels",
            torch.kernels,
            sound=not torch.kernels_remedy,
            remedy=torch.kernels_remedy,
        )


def _gpu(index: int, gpu: Gpu) -> Finding:
    memory = "memory of the host"
    if gpu.memory_total is not None and gpu.memory_free is not None:
        memory = f"{gpu.memory_free / _GIB:.1f} of {gpu.memory_total / _GIB:.1f} GiB free"
    return judge(
        f"GPU {index}",
        f"{gpu.name}, {memory}, compute capability {_dotted(gpu.compute_capability)}",
        sound=gpu.compute_capability >= OLDEST_CAPABILITY,
        remedy=f"kernels need {_dotted(OLDEST_CAPABILITY)} or newer",
    )


def _peers(inventory: GpuInventory) -> Finding:
    paths = set(inventory.peer_paths.values())
    uniform = paths in ({PeerPath.NVLINK}, {PeerPath.PCIE})
    return judge(
        "GPU peers",
        f"all over {paths.pop()}" if uniform else _matrix(inventory),
        sound=uniform or paths.isdisjoint({PeerPath.NONE, PeerPath.UNKNOWN}),
        remedy="copies between them may go through host memory; nvidia-smi topo -p2p w says why",
    )


def _matrix(inventory: GpuInventory) -> str:
    """Rows write, columns are written to."""
    indices = range(len(inventory.gpus))
    width = max(map(len, PeerPath)) + 1
    rows = [["", *map(str, indices)]]
    rows += [
        [
            str(source),
            *(inventory.peer_paths.get((source, target), "-") for target in indices),
        ]
        for source in indices
    ]
    return "\n".join(
        f"{first:<3}{''.join(f'{cell:<{width}}' for cell in rest)}".rstrip()
        for first, *rest in rows
    )


def _driver(inventory: GpuInventory, torch: TorchCuda) -> Finding:
    # Within one major version, a driver runs what was built for a later minor one.
    return judge(
        "GPU driver",
        f"{inventory.driver}, runs CUDA up to {_dotted(inventory.cuda)}",
        sound=torch.cuda is None or _major(torch.cuda) <= inventory.cuda[0],
        remedy=f"torch is built for CUDA {torch.cuda}: a newer driver, or "
        f"{_torch_install(inventory)}",
    )


def _torch(inventory: GpuInventory, torch: TorchCuda) -> Finding:
    count = len(inventory.gpus)
    if torch.cuda is None:
        detail, remedy = "built for the CPU only", _torch_install(inventory)
    else:
        detail = f"built for CUDA {torch.cuda}, can use {torch.num_gpus} of {count} GPUs"
        remedy = "see the driver above, and CUDA_VISIBLE_DEVICES"
    return judge("CUDA in torch", detail, sound=torch.num_gpus >= count, remedy=remedy)


def _ucx(transports: tuple[str, ...]) -> Finding:
    usable = [name for name in transports if name in _UCX_ON_GPUS]
    return judge(
        "UCX on GPUs",
        ", ".join(usable) or "none of its transports for GPU memory",
        sound=bool(usable),
        remedy="pip install 'pagewire[cu13]', or cu12, and not ucx; see UCX_TLS",
    )


def _torch_install(inventory: GpuInventory) -> str:
    return _TORCH_INSTALL + ("cu130" if inventory.cuda[0] >= 13 else "cu128")


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
