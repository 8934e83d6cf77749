"""A device that nobody can wait for: the double of a GPU that a host must not wait for.

Tensors of torch's `meta` device have shapes and no data, so whatever looks at a number raises. What
is copied from there to the host is all zeros, and counted.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

DEVICE = "meta"
aten = torch.ops.aten


class UnreadDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies to the host; refuses those in either direction that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_reads = 0
        # What Triton would have compiled: a kernel with all that it compiles anew for.
        self.specialisations: set[tuple[object, ...]] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.overloadpacket is aten.to:
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._to_copy.default:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            waits = not kwargs.get("non_blocking")
        elif func is aten.copy_.default:
            source, target = args[1], args[0].device
            waits = not (args[2:] or (kwargs.get("non_blocking"),))[0]
        else:
            return func(*args, **kwargs)
        if target.type == source.device.type:
            return func(*args, **kwargs)
        assert not waits, f"the host waits for a copy from {source.device} to {target}"
        if target.type == DEVICE:
            return func(*args, **kwargs)
        self.num_reads += 1
        return torch.zeros(source.shape, dtype=source.dtype)


@contextmanager
def unread_device() -> Iterator[UnreadDevice]:
    """Kernels are launched and do nothing; memory of the host need not be pinned for the double."""

    make_tensor = torch.tensor

    def tensor(values: object, **named: Any) -> Tensor:
        device = torch.device(named.get("device") or "cpu")
        assert device.type == "cpu", f"the host waits while numbers are copied to {device}"
        return make_tensor(values, **named)

    def launch(kernel: Any, grid: object) -> object:
        def run(*arguments: object, **named: object) -> None:
            device.specialisations.add(_specialisation(kernel, arguments, named))

        return run

    with pytest.MonkeyPatch.context() as patch, UnreadDevice() as device:
        patch.setattr(interpreter.InterpretedFunction, "__getitem__", launch)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(Tensor, "pin_memory", lambda values: values)
        yield device


def _specialisation(
    kernel: Any, arguments: tuple[object, ...], named: Mapping[str, object]
) -> tuple[object, ...]:
    """The kernel, constants, types, and which integers are 1 or divisible by 16."""
    parameters = inspect.signature(kernel.fn).parameters
    values = {**dict(zip(parameters, arguments, strict=False)), **named}
    plain = kernel.kwargs["do_not_specialize"] or ()
    key: list[object] = [kernel.fn.__qualname__]
    for name, value in values.items():
        is_constant = name not in parameters or parameters[name].annotation is tl.constexpr
        if isinstance(value, Tensor):
            key.append((name, value.dtype))
        elif is_constant or value is None:
            key.append((name, value))
        elif isinstance(value, int) and name not in plain:
            key.append((name, value == 1, value % 16 == 0))
        else:
            key.append((name, type(value)))
    return tuple(key)
