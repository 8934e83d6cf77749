"""Where the Triton kernels run. Imports no torch: the command line asks it too."""

import importlib.util

from pagewire.kernels.errors import KernelsUnavailableError


def is_interpreted() -> bool:
    """Whether this process interprets kernels, on a CPU, instead of compiling them."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton  # only where somebody asks: it takes a while to load

    return bool(triton.knobs.runtime.interpret)


def require_triton_device(device_type: str) -> None:
    """Raise KernelsUnavailableError, with the remedy, unless kernels can run on "cpu" or "cuda"."""
    if device_type == "cpu" and not is_interpreted():
        raise KernelsUnavailableError(
            "the Triton kernels run on a GPU, not on cpu",
            "choose kernels auto, or TRITON_INTERPRET=1 to try them slowly",
        )
