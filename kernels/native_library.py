"""The C++ kernels as a library that was loaded, and what its functions take.

`setup.py` builds one library per instruction set beside the sources in `kernels/cpu/`; each has the
same functions with a plain C interface, called through ctypes.
"""

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Before any library of ours: their OpenMP calls find the runtime, and so the threads, of torch.
import torch

from pagewire.kernels.cpu_flags import cpu_flags
from pagewire.kernels.errors import KernelsUnavailableError
from pagewire.kernels.instruction_sets import (
    FOLDER,
    INSTRUCTION_SETS,
    InstructionSet,
    built_sets,
    runnable_sets,
)

REBUILD = "install a C++ compiler (apt install g++), then: make kernels"
NO_LIBRARY = "none needed: plain torch computes the same, more slowly"

# As the functions expect them.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_P = ctypes.c_void_p
_I = ctypes.c_int64
_F = ctypes.c_float
_OUTPUT = (_P, _P)  # the result, or null and its groups in 8 bits in its place

# The arguments of each function, in the order of its definition in kernels/cpu/*.cpp.
SIGNATURES = {
    # dtype, x, groups, rows, dim
    "quantize": (_I, _P, _P, _I, _I),
    # dtype, x, outer_stride, inner_stride, weight, output (2), outer, inner, dim, eps
    "rms_norm": (_I, _P, _I, _I, _P, *_OUTPUT, _I, _I, _I, _F),
    # dtype, x, residual, weight, output (2), rows, dim, eps
    "add_rms_norm": (_I, _P, _P, _P, *_OUTPUT, _I, _I, _F),
    # dtype, gate_up, output (2), rows, dim
    "silu_mul": (_I, _P, *_OUTPUT, _I, _I),
    # dtype, q, q_stride, k, k_stride, v, v_stride, cosine, sine, pool, slots, out, num_tokens,
    # num_heads, num_kv_heads, head_dim, num_layers, layer, page_size, segment_bytes, quantized
    "rope_and_store": (_I, _P, _I, _P, _I, _P, _I, _P, _P, _P, _P, _P, *(_I,) * 9),
    # step
    "attention_sizes": (_P,),
    # step, q, token_stride, pool, layer, out
    "paged_attention": (_P, _P, _I, _P, _I, _P),
    # logits, temperature, top_k, top_p, min_p, uniform, tokens, rows, size
    "sample": (*(_P,) * 7, _I, _I),
    # logits, rows, tokens, sampled, top_ids, top, count, size, num_top
    "logprobs": (*(_P,) * 6, _I, _I, _I),
    # dtype, out_dtype, x, weight, bias, out, rows, in_features, out_features
    "linear_float": (_I, _I, _P, _P, _P, _P, _I, _I, _I),
    # dtype, x, weights, bias, out, rows, num_groups, out_features
    "linear_int8": (_I, _P, _P, _P, _P, _I, _I, _I),
    "linear_int4": (_I, _P, _P, _P, _P, _I, _I, _I),
    # dtype, weight, groups, out_features, in_features
    "quantize_weight": (_I, _P, _P, _I, _I),
    # name, run
    "recordable": (ctypes.c_char_p, _P),
    # calls, count
    "replay": (_P, _I),
}


class NativeLibraryError(KernelsUnavailableError):
    """No library of C++ kernels can be used."""


Function = Callable[..., None]
Recorder = Callable[[str, tuple[object, ...]], None]  # gets the name and arguments of each call


class NativeFunctions:
    """The functions of SIGNATURES, by their names.

    Raises AttributeError for a library without one of them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[str, Function] = {}
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = None
            self._functions[name] = function
        self.__dict__.update(self._functions)  # found without a call of __getattr__

    def __getattr__(self, name: str) -> Function:
        raise AttributeError(f"there is no C++ function {name}")

    @contextmanager
    def recorded(self, recorder: Recorder) -> Iterator[None]:
        """Within this context `recorder` hears of every call before it is made."""

        def heard(name: str, function: Function) -> Function:
            def call(*arguments: object) -> None:
                recorder(name, arguments)
                function(*arguments)

            return call

        self.__dict__.update({name: heard(name, f) for name, f in self._functions.items()})
        try:
            yield
        finally:
            self.__dict__.update(self._functions)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """A loaded library."""

    instruction_set: InstructionSet
    functions: NativeFunctions


def load_library(instruction_set: InstructionSet, folder: Path = FOLDER) -> NativeLibrary:
    """Load the build for an instruction set, which this CPU must be able to run.

    Raises NativeLibraryError when it was not built, or is not from the sources beside it.
    """
    path = folder / instruction_set.file_name
    if not path.exists():
        raise NativeLibraryError(f"{path.name} was not built", REBUILD)
    try:
        functions = NativeFunctions(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path.name} cannot be used: {error}", REBUILD) from error
    return NativeLibrary(instruction_set=instruction_set, functions=functions)


def find_library(folder: Path = FOLDER) -> NativeLibrary:
    """Load the fastest library that was built and that this CPU can run.

    Raises NativeLibraryError when there is none, or when it is not usable.
    """
    machine = platform.machine()
    runnable = runnable_sets(machine, cpu_flags())
    if not runnable:
        known = ", ".join(each.title for each in INSTRUCTION_SETS)
        raise NativeLibraryError(f"this CPU ({machine}) has none of {known}", NO_LIBRARY)
    return load_library((built_sets(folder) or runnable)[0], folder)
