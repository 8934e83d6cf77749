"""What the workers of an instance run on: the CPU, or a GPU of its own for each.

Pure but for `find_gpus`, which loads torch into the router's process where there is a GPU.
"""

from dataclasses import dataclass

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.errors import GpuDriverError, StartError
from pagewire.cluster.nvml import inspect_gpus
from pagewire.cluster.placement import tensor_parallel_size
from pagewire.engine.errors import DeviceError
from pagewire.engine.quantization import Quantization
from pagewire.worker.config import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundGpus:
    """GPUs that workers could run on."""

    count: int = 0
    problem: str = ""  # why those that are there cannot be used; empty: they can, or none is there


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    """Where all workers run."""

    name: str  # cpu or cuda
    num_gpus: int | None = None  # that they take; None on a CPU
    reason: str = ""  # why not on GPUs that there are


def find_gpus(device: str) -> FoundGpus:
    """Look for GPUs, as far as `device`, a value of ServeConfig, asks for any.

    Takes seconds where there is one: torch is loaded.
    """
    if device == "cpu":
        return FoundGpus()
    if device == "auto":
        try:
            inventory = inspect_gpus()
        except GpuDriverError as error:
            return FoundGpus(problem=f"the driver of the GPUs does not answer: {error}")
        if inventory is None or not inventory.gpus:
            return FoundGpus()
    from pagewire.engine.device import num_usable_gpus

    try:
        return FoundGpus(count=num_usable_gpus())
    except DeviceError as error:
        return FoundGpus(problem=str(error))


def choose_device(config: ServeConfig, gpus: FoundGpus) -> DeviceChoice:
    """Where the workers of `config` run. Raises StartError for GPUs that cannot be had."""
    on_cpu = DeviceChoice(name="cpu")
    if config.device == "cpu" or (config.device == "auto" and gpus == FoundGpus()):
        return on_cpu
    obstacle = gpus.problem or _obstacle(config, gpus.count)
    if not obstacle:
        return DeviceChoice(name="cuda", num_gpus=_num_ranks(config))
    if config.device == "cuda":
        raise StartError(obstacle)
    return DeviceChoice(name="cpu", reason=obstacle)


def _obstacle(config: ServeConfig, num_gpus: int) -> str:
    """Why the workers cannot run on GPUs, with the remedy; empty when they can."""
    if config.deterministic and config.decode_page_size not in (None, config.page_size):
        return (
            "on GPUs the page size decides in which order attention sums, so deterministic needs "
            f"one for all; set decode_page_size to {config.page_size}, or device to cpu"
        )
    if config.kernels == "native":
        return "kernels is native, which run on a CPU; choose auto for GPUs"
    if config.quantization is Quantization.INT4:
        return "quantization int4 has kernels on a CPU only; choose w4a16 for GPUs"
    workers, needed = config.prefill + config.decode, _num_ranks(config)
    if num_gpus < needed:
        each, fewer = "one each", "prefill or decode"
        if needed > workers:
            each, fewer = "one for each rank", "prefill, decode or tensor_parallel_size"
        return (
            f"{workers} workers need {needed} GPUs, {each}, and torch can use {num_gpus}; lower "
            f"{fewer}, show it more with CUDA_VISIBLE_DEVICES, or set device to cpu"
        )
    return ""


def _num_ranks(config: ServeConfig) -> int:
    """Of all workers."""
    prefill = config.prefill * tensor_parallel_size(config, Role.PREFILL)
    return prefill + config.decode * tensor_parallel_size(config, Role.DECODE)
