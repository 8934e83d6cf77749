"""Stage 0: what this device can do today. The floors of all other stages come from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gpu_stages import probes
from gpu_stages.items import Item
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from gpu_stages.timing import median_ms

COPY, GEMM = "copy bandwidth", "matrix product"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The limits of a device."""

    gb_per_s: float  # bytes read and bytes written
    tflop_per_s: float

    def ms_to_move(self, num_bytes: float) -> float:
        return num_bytes / self.gb_per_s / 1e6

    def ms_to_compute(self, flops: float) -> float:
        return flops / self.tflop_per_s / 1e9


def ceilings_of(measurements: Sequence[Mapping[str, object]]) -> Ceilings:
    """From what the stage measured, as JSON holds it. Raises LookupError when it measured less."""
    values = {str(each["name"]): float(str(each["value"])) for each in measurements}
    return Ceilings(gb_per_s=values[COPY], tflop_per_s=values[GEMM])


def items(scale: Scale) -> Iterator[Item]:
    yield Item(name=COPY, measure=partial(_copy, scale))
    yield Item(name=GEMM, measure=partial(_product, scale))
    yield from probes.items(scale)


def _copy(scale: Scale) -> Iterator[Measurement]:
    source = torch.ones(scale.copy_bytes, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    copy_ms = median_ms([lambda: target.copy_(source)], scale.device)
    yield Measurement(name=COPY, value=2 * scale.copy_bytes / copy_ms / 1e6, unit="GB/s")


def _product(scale: Scale) -> Iterator[Measurement]:
    size = scale.gemm_size
    a, b = (torch.randn(size, size, device=scale.device).to(scale.torch_dtype) for _ in range(2))
    out = torch.empty_like(a)
    product_ms = median_ms([lambda: torch.mm(a, b, out=out)], scale.device)
    yield Measurement(name=GEMM, value=2 * size**3 / product_ms / 1e9, unit="TFLOP/s")
