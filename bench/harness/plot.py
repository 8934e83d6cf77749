"""A series of values as one line of text. Pure."""

from collections.abc import Sequence
from itertools import pairwise

LEVELS = " .:-=+*#%@"


def sparkline(values: Sequence[float], *, width: int, top: float) -> str:
    """One character for each of `width` equal parts: the largest value there, `top` the darkest.

    Raises ValueError when there are no values.
    """
    if not values:
        raise ValueError("nothing to plot")
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    parts = [values[start:end] for start, end in pairwise(edges)]
    return "".join(_level(max(part) / top if top > 0 else 0.0) for part in parts)


def _level(share: float) -> str:
    return LEVELS[min(len(LEVELS) - 1, round(share * (len(LEVELS) - 1)))]
