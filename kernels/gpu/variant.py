"""How a kernel is launched, declared beside it, so that it can be compiled without a GPU.

Every module of this folder that has kernels lists its launches in `VARIANTS`.
"""

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from pagewire.kernels import gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What the compiler is told about a launch."""

    num_warps: int
    num_stages: int = 1  # tiles in flight of a loop over memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One kernel with the types and constants that it is launched with."""

    name: str
    kernel: Any  # triton.JITFunction, or an InterpretedFunction, which cannot be compiled
    # Type of each argument as Triton writes it, without the constants: "*bf16", "fp32", "i32",
    # "tensordesc<bf16[1, 64, 128]>". ":16" behind it: a multiple of 16, as addresses are.
    arguments: Mapping[str, str]
    constants: Mapping[str, int | float | bool | None]
    launch: LaunchConfig
    # SASS instructions of which sm_90 must have some: see `Compiled.instructions`.
    requires: tuple[str, ...] = field(default=())
    min_capability: int = 80  # of a GPU, times 10; 89 for float8 e4m3


def all_variants(*, quick: bool = False) -> Iterator[Variant]:
    """Those of every module in this folder, by module and in its order.

    With `quick` the first of each module only, which is the one that matters most.
    """
    for module in sorted(module.name for module in pkgutil.iter_modules(gpu.__path__)):
        variants: tuple[Variant, ...] = getattr(
            import_module(f"{gpu.__name__}.{module}"), "VARIANTS", ()
        )
        yield from variants[:1] if quick else variants
