"""Memory that passes for a GPU's, and what a GPU computes of it, on a CPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Words = npt.NDArray[np.uint64]


class FakeDeviceMemory:
    """Implements `pagewire.kv_transfer.device_memory.DeviceMemory` in host memory.

    UCX looks for itself where memory is, and so moves this, too.
    """

    def __init__(self, data: Tensor) -> None:
        """data: uint8 [num_bytes]."""
        self._data = data.numpy()

    def read(self) -> npt.NDArray[np.uint8]:
        """What a GPU would not let the host see."""
        return self._data

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        return self._data.__array_interface__


def split_mix(state: Words) -> Words:
    """SplitMix64, as its authors wrote it down."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def page_sum(words: Words) -> int:
    """The sum that `pagewire.kernels.gpu.page_checksum` makes, from 0 to 2^64 - 1."""
    terms = split_mix(split_mix(np.arange(len(words), dtype=np.uint64)) + words)
    return int(terms.sum())
