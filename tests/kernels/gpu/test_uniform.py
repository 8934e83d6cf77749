"""Random numbers made by a kernel: those that the host makes."""

import numpy as np
import torch

from pagewire.engine import random_numbers
from pagewire.kernels.gpu.uniform import uniform


def numbers(seeds: np.ndarray, positions: np.ndarray) -> torch.Tensor:
    return uniform(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions))


def test_numbers_are_those_of_the_host() -> None:
    seeds = np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64)
    seeds[:3] = 0, 1, 2**64 - 1
    positions = np.arange(300)
    expected = random_numbers.uniform(seeds, positions.tolist())
    assert numbers(seeds, positions).tolist() == expected.tolist()


def test_numbers_are_uniform() -> None:
    """Chi-square of 10,000 numbers of one seed in 50 bins; 85.4 is its 0.1 % quantile."""
    count, num_bins = 10_000, 50
    drawn = numbers(np.full(count, 7, dtype=np.uint64), np.arange(count))
    found = torch.bincount((drawn * num_bins).long(), minlength=num_bins)
    wanted = count / num_bins
    assert float(((found - wanted) ** 2 / wanted).sum()) < 85.4
