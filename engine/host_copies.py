"""Copies between the host and a GPU for which neither waits, through memory that stays in place.

From memory that the system may move, CUDA copies only after all that was launched before.
"""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """`values`, which may be changed afterwards unless the device is a CPU."""
    host = torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that this process has told it to; at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostCopy:
    """What a tensor holds now, for the host to read later."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True, copy=True)
        self._written: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._written.record()

    def wait(self) -> Tensor:
        """The copy, once it is complete."""
        if self._written is not None:
            self._written.synchronize()
        return self._values
