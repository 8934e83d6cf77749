"""Makes Triton's interpreter refuse every access outside of the tensors that a kernel was given.

A GPU faults on few of them and the interpreter on none: a wrong mask reads another tensor.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

Extent = tuple[int, int]  # first byte, and the one behind the last


@contextmanager
def checked_memory() -> Iterator[None]:
    """Until it is left, every lane of a load, store or atomic must be inside a tensor argument.

    Raises IndexError inside of a kernel, which comes out as an InterpreterError with its text.
    Infinities and NaN in arithmetic pass without a warning meanwhile, as on a GPU.
    """
    builder, executor = InterpreterBuilder, GridExecutor
    extents: list[Extent] = []  # of the running kernel
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(executor, "_init_args_hst", _noted(executor._init_args_hst, extents))
        load, store = builder.create_masked_load, builder.create_masked_store
        patch.setattr(builder, "create_masked_load", _checked(load, "load", extents, mask=1))
        patch.setattr(builder, "create_masked_store", _checked(store, "store", extents, mask=2))
        rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
        patch.setattr(
            builder, "create_atomic_rmw", _checked(rmw, "atomic", extents, pointer=1, mask=3)
        )
        patch.setattr(builder, "create_atomic_cas", _checked(cas, "atomic", extents, mask=None))
        yield


def _noted(original: Any, extents: list[Extent]) -> Any:
    """Of what copies the arguments of a kernel to the host, where it runs."""

    def to_host(self: Any, arguments: Any, named: dict[str, Any]) -> Any:
        on_host, named_on_host = original(self, arguments, named)
        extents[:] = map(_extent, _tensors([*on_host, *named_on_host.values()]))
        return on_host, named_on_host

    return to_host


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, Tensor):
            yield argument


def _extent(tensor: Tensor) -> Extent:
    """From the first to the last element of a view."""
    first: int = tensor.data_ptr()
    if not tensor.numel():
        return first, first
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return first, first + (last + 1) * tensor.element_size()


def _checked(
    original: Any, what: str, extents: list[Extent], *, pointer: int = 0, mask: int | None
) -> Any:
    """`pointer` and `mask` say which arguments they are; without a mask every lane counts."""

    def access(self: Any, *arguments: Any, **options: Any) -> Any:
        lanes = True if mask is None else arguments[mask].data
        _require_inside(arguments[pointer], lanes, what, extents)
        return original(self, *arguments, **options)

    return access


def _require_inside(
    pointers: TensorHandle, lanes: npt.ArrayLike, what: str, extents: list[Extent]
) -> None:
    addresses = pointers.data[np.broadcast_to(lanes, pointers.data.shape).astype(bool)]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, dtype=bool)
    for first, end in extents:
        inside |= (addresses >= first) & (addresses + np.uint64(size) <= end)
    if not inside.all():
        raise IndexError(f"{what} out of bounds in {(~inside).sum()} of {inside.size} lanes")
