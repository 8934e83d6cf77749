"""Which implementation of the operations a worker runs, and why: chosen once, at its start."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor

from pagewire.kernels import w4a16, w8a8
from pagewire.kernels.emulated_linear import EmulatedLinears
from pagewire.kernels.errors import KernelsUnavailableError
from pagewire.kernels.experts import Experts
from pagewire.kernels.native_library import (
    NO_LIBRARY,
    NativeLibrary,
    NativeLibraryError,
    find_library,
)
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import Ops
from pagewire.kernels.quantized_linears import QuantizedLinears
from pagewire.kernels.torch_ops import TorchOps
from pagewire.kernels.triton_device import is_interpreted, require_triton_device


class Kernels(StrEnum):
    """What a user can ask for."""

    AUTO = "auto"  # C++ on a CPU where it was built, Triton on a GPU, else plain torch
    NATIVE = "native"
    TORCH = "torch"
    TRITON = "triton"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedOps:
    """The operations to run, and for people which they are and why."""

    ops: Ops
    library: NativeLibrary | None  # that the matrices too are multiplied with; None: torch does
    deterministic: bool = False  # results are the same to the bit in every batch
    has_fp8_cache: bool = False  # attention reads a KV cache in fp8
    # What multiplies W8A8 and W4A16 as a GPU does; the C++ library has other forms.
    quantized_linears: QuantizedLinears | None = None
    # What runs all experts of a layer at once, of gate_up and down of each in floating point.
    group_experts: Callable[[Sequence[Tensor], Sequence[Tensor]], Experts] | None = None
    explanation: str
    remedy: str = ""  # what would make C++ ones available that were wanted


def select_ops(
    kernels: Kernels,
    device: str,
    *,
    deterministic: bool = False,
    fp8: bool = False,
) -> SelectedOps:
    """Choose the operations for a device as torch names it.

    With `fp8` a GPU quantises activations to it for matrices in 8 bits, otherwise to int8.

    Raises KernelsUnavailableError, with the remedy, where operations cannot run that were asked
    for; `deterministic` needs those in C++ or Triton: torch sums in another order for every size of
    a batch.
    """
    on_cpu = torch.device(device).type == "cpu"
    try:
        match kernels:
            case Kernels.TORCH if deterministic:
                raise KernelsUnavailableError(
                    "plain torch is not deterministic", "choose kernels auto"
                )
            case Kernels.TORCH:
                return _torch(device, "as configured")
            case Kernels.NATIVE:
                return _native(device, deterministic)
            case Kernels.TRITON:
                return _triton(device, deterministic, fp8)
            case Kernels.AUTO if on_cpu:
                return _native(device, deterministic)
            case Kernels.AUTO:
                return _triton(device, deterministic, fp8)
    except KernelsUnavailableError as error:
        if kernels is not Kernels.AUTO or deterministic:
            raise
        return _torch(device, error.reason, error.remedy)


def _native(device: str, deterministic: bool) -> SelectedOps:
    if torch.device(device).type != "cpu":
        raise NativeLibraryError(f"the C++ kernels run on a CPU, not on {device}", NO_LIBRARY)
    library = find_library()
    title = library.instruction_set.title
    return SelectedOps(
        ops=NativeOps(library, deterministic=deterministic),
        library=library,
        deterministic=deterministic,
        explanation=f"C++ for {title}",
    )


def _triton(device: str, deterministic: bool, fp8: bool) -> SelectedOps:
    if importlib.util.find_spec("triton") is None:
        raise KernelsUnavailableError("triton is not installed", "pip install triton, on Linux")
    # Only where it is wanted: it is not there on every platform, and takes a while to load.
    from pagewire.kernels.gpu.cuda_graphs import CudaGraphs
    from pagewire.kernels.gpu.grouped_experts import group_experts
    from pagewire.kernels.gpu.triton_linears import TritonLinears
    from pagewire.kernels.triton_ops import TritonOps, find_gpu

    require_triton_device(torch.device(device).type)
    gpu = find_gpu(device)
    capture = None if is_interpreted() else CudaGraphs(device).capture
    return SelectedOps(
        ops=TritonOps(gpu, capture, w8a8.FP8 if fp8 else torch.int8, deterministic=deterministic),
        library=None,
        deterministic=deterministic,
        has_fp8_cache=gpu.has_fp8,
        quantized_linears=TritonLinears(
            device=device,
            dtypes=(torch.int8, w4a16.DTYPE, *((w8a8.FP8,) if gpu.has_fp8 else ())),
        ),
        group_experts=partial(group_experts, invariant=deterministic),
        explanation=f"Triton on {gpu.title}",
    )


def _torch(device: str, reason: str, remedy: str = "") -> SelectedOps:
    on_cpu = torch.device(device).type == "cpu"  # elsewhere nobody is slow by accident
    return SelectedOps(
        ops=TorchOps(),
        library=None,
        has_fp8_cache=on_cpu,
        quantized_linears=EmulatedLinears(dtypes=(w8a8.FP8, w4a16.DTYPE)) if on_cpu else None,
        explanation=f"plain torch: {reason}",
        remedy=remedy,
    )
