"""A kernel on one set of inputs: how it is run, what must come out, and what it costs at least."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_stages.noise import fill_with_noise
from gpu_stages.scale import KernelSizes, Scale
from pagewire.engine.kv_cache import KVCache
from pagewire.kernels.ops import Ops
from pagewire.kv_transfer.layout import KVLayout

# Of ‖value - expected‖ / ‖expected‖; rounding to the dtype alone is half of it.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-5}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelCase:
    """One kernel on fresh inputs."""

    run: Callable[[], Any]
    expected: Callable[[], Tensor]  # float64, or integers that must be the same
    read: Callable[[Any], Tensor] | None = None  # from what `run` returns; None: that is it
    num_bytes: float  # that must be read and written
    flops: float = 0  # of its matrix products
    max_ratio: float | None  # of its time to the floor; None: nothing is asked of it

    def result(self) -> Tensor:
        """What a run leaves."""
        returned = self.run()
        result: Tensor = returned if self.read is None else self.read(returned)
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """What cases are made in."""

    scale: Scale
    sizes: KernelSizes
    ops: Ops

    def randn(self, *shape: int) -> Tensor:
        """In the dtype of the scale, on its device."""
        return torch.randn(*shape, device=self.scale.device).to(self.scale.torch_dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        """int32, on the device."""
        return torch.randint(below, shape, device=self.scale.device, dtype=torch.int32)

    def permutation(self, count: int) -> Tensor:
        """int32 [count], on the device."""
        return torch.randperm(count, device=self.scale.device).int()

    def cache(
        self,
        num_pages: int,
        num_layers: int,
        dtype: str | None = None,
        *,
        page_size: int | None = None,
    ) -> KVCache:
        """Pages of random numbers; None stands for what the scale has."""
        model = self.scale.model
        layout = KVLayout(
            page_size=page_size or self.scale.page_size,
            num_layers=num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype or self.scale.dtype,
        )
        cache = KVCache(layout, num_pages, self.scale.device)
        fill_with_noise(cache.pages)
        return cache


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCase:
    """A case that is made when its turn comes, and whose memory is given back behind it."""

    name: str
    make: Callable[[Setting], KernelCase]
    needs_fp8: bool = False  # numbers that Triton's interpreter narrows otherwise than GPUs


def error(value: Tensor, expected: Tensor) -> float:
    """‖value - expected‖ / ‖expected‖ of floats, of integers how many differ. NaN stays NaN."""
    value, expected = value.cpu(), expected.cpu()
    if not expected.is_floating_point():
        return float((value != expected).sum())
    distance = (value.double() - expected.double()).norm()
    return float(distance / expected.double().norm())


def tolerance(value: Tensor, expected: Tensor) -> float:
    """The largest `error` of a result."""
    return TOLERANCE[value.dtype] if expected.is_floating_point() else 0.0


def same_bytes(*tensors: Tensor) -> Tensor:
    """The bytes of tensors as one row of integers: where results must be the same to the bit."""
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])
