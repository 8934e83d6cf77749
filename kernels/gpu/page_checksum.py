"""The checksum of bytes where they lie in the memory of a GPU, so that they need not leave it.

Each word of 64 bits is mixed with its place by SplitMix64, and the results are added modulo 2^64: a
sum that is exact in any order, so that blocks of the data are read by whichever core is free.

What it detects: another word in a place always gives another sum, since the mix maps words one to
one. Where several words change, move or change places, the differences of their terms are like
random numbers of 64 bits, as is the term of a word that is missing, zeros included. The host mixes
the number of bytes in and keeps 32 bits, as many as the header of a frame holds: an accident goes
unnoticed once in 2^32, as with a CRC-32, which besides finds every short burst. It stops no
attacker.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require, require_array
from pagewire.kernels.gpu.split_mix import mix
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
WORD_BYTES = 8
BLOCK_WORDS = 2048  # 16 KiB of a program


@triton.jit(do_not_specialize=["sum_ptr", "num_words"])
def _checksum_kernel(
    data_ptr: tl.tensor,  # int64 [num_words]
    sum_ptr: tl.tensor,  # int64 [1], 0 before
    num_words: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_words
    word = tl.load(data_ptr + place, mask=inside, other=0).to(tl.uint64, bitcast=True)
    mixed = mix(mix(place.to(tl.uint64, bitcast=True)) + word).to(tl.int64, bitcast=True)
    tl.atomic_add(sum_ptr, tl.sum(tl.where(inside, mixed, 0)), sem="relaxed")


def begin_checksum(data: Tensor, total: Tensor, *, block_words: int = BLOCK_WORDS) -> None:
    """Tell the device to make the sum over `data`, from which the checksum is made
    (`pagewire.kv_transfer.checksum.checksum_of_sum`).

    data: uint8 [num_bytes], contiguous, a multiple of 8; total: int64 [1], which is written.
    `block_words`, a power of 2, are added up by one program and change nothing else. Raises
    KernelArgumentError.
    """
    require_array("data", data, (None,), torch.uint8)
    require_array("total", total, (1,), torch.int64, device=data.device)
    num_bytes = len(data)
    require(
        num_bytes > 0 and num_bytes % WORD_BYTES == 0,
        f"data has {num_bytes} bytes; give a positive multiple of {WORD_BYTES}",
    )
    require(
        data.data_ptr() % WORD_BYTES == 0,
        f"data begins at an address that is no multiple of {WORD_BYTES}; give a copy",
    )
    num_words = num_bytes // WORD_BYTES
    total.zero_()
    _checksum_kernel[(triton.cdiv(num_words, block_words),)](
        data.view(torch.int64), total, num_words, block_words, num_warps=LAUNCH.num_warps
    )


VARIANTS = (
    Variant(
        name="page_checksum",
        kernel=_checksum_kernel,
        arguments={"data_ptr": "*i64:16", "sum_ptr": "*i64", "num_words": "i32"},
        constants={"BLOCK": BLOCK_WORDS},
        launch=LAUNCH,
    ),
)
