"""Presence, frequency and repetition penalties on the tokens that a sequence holds.

logit / r if it is positive, logit * r if not (Keskar et al., 2019), then minus f * count and minus
p where count > 0, as OpenAI defines these two; count is how often the output holds the token. As
sparse as the histories of the sequences. A program does one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
_BLOCK = 512  # tokens that a program changes at a time


@triton.jit
def _apply_penalties_kernel(
    logits_ptr: tl.tensor,  # float32 [num_rows, vocab_size]
    offsets_ptr: tl.tensor,  # int32 [num_rows + 1]
    tokens_ptr: tl.tensor,  # int64 [num_pairs]
    counts_ptr: tl.tensor,  # float32 [num_pairs]
    repetition_ptr: tl.tensor,  # float32 [num_rows]
    frequency_ptr: tl.tensor,  # float32 [num_rows]
    presence_ptr: tl.tensor,  # float32 [num_rows]
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1)
    r, f, p = (
        tl.load(repetition_ptr + row),
        tl.load(frequency_ptr + row),
        tl.load(presence_ptr + row),
    )
    for start in range(tl.load(offsets_ptr + row), end, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < end
        places = logits_ptr + row * vocab_size + tl.load(tokens_ptr + pair, mask=inside, other=0)
        values = tl.load(places, mask=inside)
        count = tl.load(counts_ptr + pair, mask=inside)
        values = tl.where(values > 0, tl.div_rn(values, r), values * r)
        values -= f * count + p * (count > 0).to(tl.float32)
        tl.store(places, values, mask=inside)


def apply_penalties(
    logits: Tensor,
    *,
    offsets: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Lower, in place, the logits of tokens that each row's sequence holds.

    logits: float32 [num_rows, vocab_size], contiguous. The distinct tokens of a row lie at
    offsets[row] up to offsets[row + 1]; offsets: int32 [num_rows + 1]; tokens: int64 [num_pairs],
    of prompt and output; counts: float32 [num_pairs], in the output; repetition (1: none),
    frequency and presence (0: none): float32 [num_rows]. To the bit what torch computes. Raises
    KernelArgumentError for tensors that are not so.
    """
    require_array("logits", logits, (None, None), torch.float32)
    num_rows, vocab_size = logits.shape
    device = logits.device
    require_array("offsets", offsets, (num_rows + 1,), torch.int32, device=device)
    require_array("tokens", tokens, (None,), torch.int64, device=device)
    require_array("counts", counts, (len(tokens),), torch.float32, device=device)
    for name, column in (
        ("repetition", repetition),
        ("frequency", frequency),
        ("presence", presence),
    ):
        require_array(name, column, (num_rows,), torch.float32, device=device)
    _apply_penalties_kernel[(num_rows,)](
        logits,
        offsets,
        tokens,
        counts,
        repetition,
        frequency,
        presence,
        vocab_size,
        _BLOCK,
        num_warps=LAUNCH.num_warps,
        enable_fp_fusion=False,  # torch rounds each product
    )


VARIANTS = (
    Variant(
        name="apply_penalties",
        kernel=_apply_penalties_kernel,
        arguments={
            "logits_ptr": "*fp32:16",
            "offsets_ptr": "*i32:16",
            "tokens_ptr": "*i64:16",
            "counts_ptr": "*fp32:16",
            "repetition_ptr": "*fp32:16",
            "frequency_ptr": "*fp32:16",
            "presence_ptr": "*fp32:16",
            "vocab_size": "i32:16",
        },
        constants={"BLOCK": _BLOCK},
        launch=LAUNCH,
    ),
)
