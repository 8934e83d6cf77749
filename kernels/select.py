"""Which implementation of the operations a worker runs, and why: chosen once, at its start."""

from dataclasses import dataclass
from enum import StrEnum

from pagewire.kernels.native_library import (
    NO_LIBRARY,
    NativeLibrary,
    NativeLibraryError,
    find_library,
)
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import Ops
from pagewire.kernels.torch_ops import TorchOps


class Kernels(StrEnum):
    """What a user can ask for."""

    AUTO = "auto"  # C++ on a CPU where it was built, else plain torch
    NATIVE = "native"
    TORCH = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedOps:
    """The operations to run, and for people which they are and why."""

    ops: Ops
    library: NativeLibrary | None  # that the matrices too are multiplied with; None: torch does
    deterministic: bool = False  # results are the same to the bit in every batch
    explanation: str
    remedy: str = ""  # what would make C++ ones available that were wanted


def select_ops(kernels: Kernels, device: str, *, deterministic: bool = False) -> SelectedOps:
    """Choose the operations for a device as torch names it.

    Raises NativeLibraryError, with the remedy, where there are no C++ kernels and NATIVE, or
    `deterministic`, needs them: torch sums in another order for every size of a batch.
    """
    if kernels is Kernels.TORCH:
        if deterministic:
            raise NativeLibraryError("plain torch is not deterministic", "choose kernels auto")
        return _torch("as configured")
    try:
        if device != "cpu":
            raise NativeLibraryError(f"the C++ kernels run on a CPU, not on {device}", NO_LIBRARY)
        library = find_library()
    except NativeLibraryError as error:
        if kernels is Kernels.NATIVE or deterministic:
            raise
        return _torch(error.reason, error.remedy)
    title = library.instruction_set.title
    return SelectedOps(
        ops=NativeOps(library, deterministic=deterministic),
        library=library,
        deterministic=deterministic,
        explanation=f"C++ for {title}",
    )


def _torch(reason: str, remedy: str = "") -> SelectedOps:
    return SelectedOps(
        ops=TorchOps(), library=None, explanation=f"plain torch: {reason}", remedy=remedy
    )
