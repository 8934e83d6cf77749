"""The random numbers behind every seed."""

import numpy as np

from pagewire.engine.random_numbers import uniform


def test_the_random_numbers_never_change() -> None:
    """They are part of what a seed means: a resumed stream may run on a newer worker."""
    values = uniform(np.array([0, 0, 1, 2**64 - 1], dtype=np.uint64), [0, 1, 0, 123])
    assert values.tolist() == [
        0.6524484863740322,
        0.1663964394676608,
        0.36818951565166946,
        0.5922307863241688,
    ]
