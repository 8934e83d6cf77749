"""Checks of what the wrappers of Triton kernels are given, before an address reaches a kernel."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class KernelArgumentError(ValueError):
    """A kernel was given tensors that it does not take."""


def require(condition: bool, problem: str) -> None:
    """Raise KernelArgumentError with `problem`, which names the argument and the remedy."""
    if not condition:
        raise KernelArgumentError(problem)


def require_floats(**tensors: Tensor) -> None:
    """All have the same floating dtype and device."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or not set(dtypes.values()) <= set(FLOATS):
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise KernelArgumentError(f"got {given}; give all in one of {', '.join(map(str, FLOATS))}")
    require_same_device(**tensors)


def require_same_device(**tensors: Tensor) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise KernelArgumentError(f"got {given}; move all to one device")


def require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """None stands for any size."""
    matches = len(shape) == tensor.dim() and all(
        wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    require(matches, f"{name} is {list(tensor.shape)}; give [{wanted}]")


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    require(tensor.dtype is dtype, f"{name} is {tensor.dtype}; give {dtype}")


def require_dense(**tensors: Tensor) -> None:
    """The last dimension of each lies in one run."""
    for name, tensor in tensors.items():
        require(
            tensor.stride(-1) == 1,
            f"the last dimension of {name} has stride {tensor.stride(-1)}; give a copy with 1",
        )


def require_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.is_contiguous(), f"{name} is not contiguous; give a contiguous copy")


def require_scaled_product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, *dtypes: torch.dtype
) -> None:
    """What (x * x_scales) @ (weight * weight_scales)ᵀ takes: x and weight of one of `dtypes`.

    x: [num_tokens, num_inputs]; weight: [num_outputs, num_inputs]; scales: float32, one a row.
    """
    require_array("x", x, (None, None), *dtypes)
    require_array("weight", weight, (None, x.shape[1]), x.dtype, device=x.device)
    require_array("x_scales", x_scales, (len(x),), torch.float32, device=x.device)
    require_array("weight_scales", weight_scales, (len(weight),), torch.float32, device=x.device)


def require_array(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    *dtypes: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """A contiguous tensor of such a shape, of one of `dtypes` if any are named, on `device`."""
    require_shape(name, tensor, shape)
    wanted = " or ".join(map(str, dtypes))
    require(not dtypes or tensor.dtype in dtypes, f"{name} is {tensor.dtype}; give {wanted}")
    require(device in (None, tensor.device), f"{name} is on {tensor.device}; move it to {device}")
    require_contiguous(**{name: tensor})
