"""Random numbers keyed by a seed and a position: no state to save, none to hand over."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]


def uniform(seeds: Bits, positions: Sequence[int]) -> NDArray[np.float64]:
    """A number of [0, 1) for each (seed, position), both [num_rows].

    Two rounds of the SplitMix64 finaliser (Steele, Lea and Flood 2014), in arithmetic modulo 2^64.
    """
    state = _mix(seeds) + np.asarray(positions, dtype=np.uint64)
    return (_mix(state) >> np.uint64(11)) / np.float64(1 << 53)


def _mix(state: Bits) -> Bits:
    state = state + np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's fraction
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
