"""SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

Its finaliser maps 64 bits to 64 one to one, and half of them change with any one bit of the input.
"""

import triton
import triton.language as tl


@triton.jit
def mix(state: tl.tensor) -> tl.tensor:
    """One step and the finaliser, modulo 2^64; state: uint64."""
    state += 0x9E3779B97F4A7C15  # the golden ratio's fraction
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)
