"""Random numbers keyed by a seed and a position: no state to save, none to hand over."""

import torch
from torch import Tensor


def signed_seeds(seeds: list[int]) -> Tensor:
    """Unsigned seeds of 64 bits as int64 [num_rows], which has the same bits."""
    signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
    return torch.tensor(signed, dtype=torch.int64)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number of [0, 1) for each (seed, position), float64 [num_rows].

    Two rounds of the SplitMix64 finaliser (Steele, Lea and Flood 2014), which is exact in any
    integer arithmetic of 64 bits.
    """
    state = _mix(seeds) + positions
    return _shift_right(_mix(state), 11).double() / (1 << 53)


def _mix(state: Tensor) -> Tensor:
    state = state - 0x61C8864680B583EB  # the golden ratio's fraction, as a signed number
    state = (state ^ _shift_right(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shift_right(state, 27)) * -0x6B2FB644ECCEEE15
    return state ^ _shift_right(state, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
