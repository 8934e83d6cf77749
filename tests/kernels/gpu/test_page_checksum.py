"""The checksum of a device's bytes: that of an oracle, and another after every kind of accident."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fake_device import page_sum
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.page_checksum import begin_checksum
from pagewire.kv_transfer.checksum import checksum_of_sum

NUM_WORDS = 300
Words = npt.NDArray[np.uint64]


def checksum(words: Words, block_words: int = 128) -> int:
    data, total = torch.from_numpy(words.view(np.uint8)), torch.full((1,), -1)
    begin_checksum(data, total, block_words=block_words)
    return checksum_of_sum(int(total), words.nbytes)


def oracle(words: Words) -> int:
    return checksum_of_sum(page_sum(words), words.nbytes)


def random_words(count: int = NUM_WORDS, seed: int = 0) -> Words:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


@pytest.mark.parametrize("words", [random_words(), np.zeros(NUM_WORDS, np.uint64), random_words(1)])
@pytest.mark.parametrize("block_words", [16, 128, 512])
def test_it_is_that_of_the_oracle_however_the_work_is_divided(
    words: Words, block_words: int
) -> None:
    assert checksum(words, block_words) == oracle(words)


def test_the_same_bytes_elsewhere_have_the_same_checksum() -> None:
    words = random_words()
    shifted = np.concatenate([random_words(1, seed=1), words])[1:]
    assert checksum(shifted) == checksum(words)


@settings(max_examples=30)
@given(st.integers(0, NUM_WORDS * 64 - 1), st.booleans())
def test_one_bit_changes_it(bit: int, is_zero: bool) -> None:
    words = np.zeros(NUM_WORDS, np.uint64) if is_zero else random_words()
    changed = words.copy()
    changed[bit // 64] ^= np.uint64(1 << bit % 64)
    assert checksum(changed) != checksum(words)


def swap_words(words: Words) -> Words:
    changed = words.copy()
    changed[[17, 250]] = changed[[250, 17]]
    return changed


def clear(words: Words) -> Words:
    changed = words.copy()
    changed[100:150] = 0
    return changed


ACCIDENTS: dict[str, Callable[[Words], Words]] = {
    "two words change places": swap_words,
    "halves change places": lambda words: np.roll(words, NUM_WORDS // 2),
    "all is one word late": lambda words: np.roll(words, 1),
    "all is one byte late": lambda words: np.roll(words.view(np.uint8), 1).view(np.uint64),
    "the end is missing": lambda words: words[:-1].copy(),
    "the beginning is missing": lambda words: words[1:].copy(),
    "a word more": lambda words: np.append(words, np.uint64(0)),
    "a run is zero": clear,
    "all is zero": np.zeros_like,
    "a word comes twice": lambda words: np.insert(words, 5, words[5])[:-1],
    "every word's sign": lambda words: words ^ np.uint64(1 << 63),
    "two words, one as much more as the other less": lambda words: (
        words + np.eye(1, NUM_WORDS, 3, np.uint64)[0] - np.eye(1, NUM_WORDS, 9, np.uint64)[0]
    ),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_accidents_change_it(accident: str) -> None:
    words = random_words()
    assert checksum(ACCIDENTS[accident](words)) != checksum(words)


@pytest.mark.parametrize("count", [1, 7, 128, 256])
def test_zeros_have_a_checksum_for_each_length(count: int) -> None:
    zeros = [np.zeros(length, np.uint64) for length in (count, count + 1)]
    assert len({0, *map(checksum, zeros)}) == 3


def test_what_it_does_not_take() -> None:
    total = torch.zeros(1, dtype=torch.int64)
    data = torch.zeros(64, dtype=torch.uint8)
    refused: list[tuple[torch.Tensor, torch.Tensor, str]] = [
        (data[:60], total, "data has 60 bytes; give a positive multiple of 8"),
        (data[:0], total, "data has 0 bytes"),
        (data[4:12], total, "address that is no multiple of 8"),
        (data[::2], total, "data is not contiguous"),
        (data.view(torch.int64), total, r"data is torch\.int64; give torch\.uint8"),
        (data, torch.zeros(2, dtype=torch.int64), r"total is \[2\]; give \[1\]"),
        (data, total.to("meta"), "total is on meta; move it to cpu"),
    ]
    for wrong_data, wrong_total, problem in refused:
        with pytest.raises(KernelArgumentError, match=problem):
            begin_checksum(wrong_data, wrong_total)
