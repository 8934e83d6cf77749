"""A device that nobody can wait for: the double of a GPU that a host must not wait for.

Tensors of torch's `meta` device have shapes and no data, so whatever looks at a number raises. What
is copied from there to the host is all zeros, and counted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

DEVICE = "meta"
aten = torch.ops.aten


class UnreadDevice(TorchDispatchMode):
    """Counts copies to the host; refuses those in either direction that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

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

    def launch(kernel: object, grid: object) -> object:
        return lambda *arguments, **named: None

    with pytest.MonkeyPatch.context() as patch, UnreadDevice() as device:
        patch.setattr(interpreter.InterpretedFunction, "__getitem__", launch)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(Tensor, "pin_memory", lambda values: values)
        yield device
