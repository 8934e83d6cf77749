"""Stage 2: how long the kernels take, against reading and computing everything once."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_stages.ceilings import Ceilings
from gpu_stages.kernel_cases import kernel_cases
from gpu_stages.measurement import Measurement, above_floor
from gpu_stages.scale import Scale
from gpu_stages.timing import median_ms
from pagewire.kernels.select import Kernels, select_ops

NUM_BUFFERS = 2  # in turns; each of a GPU's sizes alone is larger than its L2


def measure(scale: Scale, ceilings: Ceilings) -> Iterator[Measurement]:
    torch.manual_seed(0)
    ops = select_ops(Kernels.TRITON, scale.device).ops
    turns = [kernel_cases(scale, scale.timed, ops) for _ in range(NUM_BUFFERS)]
    for cases in zip(*turns, strict=True):
        case = cases[0]
        floor = max(ceilings.ms_to_move(case.num_bytes), ceilings.ms_to_compute(case.flops))
        measured = median_ms([each.run for each in cases], scale.device)
        yield above_floor(case.name, measured, floor, times=case.max_ratio)
    yield _sdpa(scale, ceilings)


def _sdpa(scale: Scale, ceilings: Ceilings) -> Measurement:
    """What torch's own attention takes for the prompt of `prefill attention`, not in pages."""
    model, num_tokens = scale.model, scale.timed.chunk_len
    q, k, v = (
        torch.randn(1, heads, num_tokens, model.head_dim, device=scale.device).to(scale.torch_dtype)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    )

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    flops = 2 * num_tokens * (num_tokens + 1) * model.num_heads * model.head_dim
    return Measurement(
        name="prefill attention by torch, for comparison",
        value=median_ms([run], scale.device),
        unit="ms",
        floor=ceilings.ms_to_compute(flops),
    )
