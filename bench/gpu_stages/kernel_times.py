"""Stage 2: how long the kernels take, against reading and computing everything once."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_stages.cases.catalog import TIMED
from gpu_stages.cases.kernel_case import NamedCase, Setting
from gpu_stages.ceilings import Ceilings
from gpu_stages.items import Item
from gpu_stages.kernels import require_fp8
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from gpu_stages.timing import median_ms
from pagewire.kernels.select import Kernels, select_ops

PAST_L2 = 3  # times the size of a GPU's second cache: so much is read before anything is again
MAX_COPIES = 32


def items(scale: Scale, ceilings: Ceilings) -> Iterator[Item]:
    ops = select_ops(Kernels.TRITON, scale.device).ops
    setting = Setting(scale=scale, sizes=scale.timed, ops=ops)
    for case in TIMED:
        yield Item(name=case.name, measure=partial(_time, case, setting, ceilings))
    yield Item(name="attention by torch", measure=partial(_sdpa, scale, ceilings))


def num_copies(num_bytes: float, cache_bytes: int) -> int:
    """How many sets of inputs, used in turns, no cache holds what one call reads."""
    return min(MAX_COPIES, max(1, -int(-PAST_L2 * cache_bytes // num_bytes)))


def _time(case: NamedCase, setting: Setting, ceilings: Ceilings) -> Iterator[Measurement]:
    scale = setting.scale
    if case.needs_fp8:
        require_fp8(scale)
    torch.manual_seed(0)
    first = case.make(setting)
    copies = num_copies(first.num_bytes, _cache_bytes(scale))
    runs = [first.run, *(case.make(setting).run for _ in range(copies - 1))]
    floor = max(ceilings.ms_to_move(first.num_bytes), ceilings.ms_to_compute(first.flops))
    yield Measurement(
        name=case.name,
        value=median_ms(runs, scale.device),
        unit="ms",
        floor=floor,
        limit=first.max_ratio and floor * first.max_ratio,
    )


def _cache_bytes(scale: Scale) -> int:
    if scale.device == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(scale.device).L2_cache_size)


def _sdpa(scale: Scale, ceilings: Ceilings) -> Iterator[Measurement]:
    """What FlashAttention takes for the prompt of `prefill attention`, not in pages."""
    model, num_tokens = scale.model, scale.timed.chunk_len
    q, k, v = (
        torch.randn(1, heads, num_tokens, model.head_dim, device=scale.device).to(scale.torch_dtype)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    )

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    flops = 2 * num_tokens * (num_tokens + 1) * model.num_heads * model.head_dim
    yield Measurement(
        name="prefill attention by torch's FlashAttention, for comparison",
        value=median_ms([run], scale.device),
        unit="ms",
        floor=ceilings.ms_to_compute(flops),
    )
