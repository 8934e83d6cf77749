"""The KV cache as operations see it: keys and values of every page, in floats or in 8 bits.

The bytes are those that workers exchange, in the layout of `KVLayout`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

QUANTIZED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest number of each

_SCALE = torch.float32


class KVPool:
    """Views of one byte pool: for each page, layer and KV head a segment of K, then V.

    In 8 bits each K and each V of a token and head is values * scale, as `quantize_vectors`
    makes them, and the scales of a segment lie behind its values.
    """

    __slots__ = ("scales", "segment_bytes", "values")

    values: Tensor  # [num_pages, num_layers, num_kv_heads, 2 (K, V), page_size, head_dim]
    # float32 [num_pages, num_layers, num_kv_heads, 2, page_size], of values in 8 bits
    scales: Tensor | None
    segment_bytes: int  # from one (page, layer, KV head) to the next

    def __init__(
        self,
        data: Tensor,
        dtype: torch.dtype,
        *,
        num_layers: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
    ) -> None:
        """data: uint8 [num_pages, page_bytes], contiguous; dtype: of floats, or one of QUANTIZED.

        Raises ValueError when `data` does not hold such pages.
        """
        vector_bytes = head_dim * dtype.itemsize
        if dtype in QUANTIZED:
            vector_bytes += _SCALE.itemsize
        self.segment_bytes = 2 * page_size * vector_bytes
        page_bytes = num_layers * num_kv_heads * self.segment_bytes
        if data.dtype is not torch.uint8 or data.shape[1:] != (page_bytes,):
            raise ValueError(
                f"the pool is {data.dtype} {list(data.shape)}; give uint8 [num_pages, {page_bytes}]"
            )
        if not data.is_contiguous():
            raise ValueError("the pool is not contiguous; give the whole pool, not a part of it")
        heads = (len(data), num_layers, num_kv_heads)
        segments = data.view(*heads, self.segment_bytes)
        num_values = 2 * page_size * head_dim
        self.values = segments.view(dtype)[..., :num_values].view(*heads, 2, page_size, head_dim)
        self.scales = None
        if dtype in QUANTIZED:
            scales = segments.view(_SCALE)[..., num_values // _SCALE.itemsize :]
            self.scales = scales.view(*heads, 2, page_size)

    def require(
        self, dtype: torch.dtype, *, quantized: Iterable[torch.dtype] = tuple(QUANTIZED)
    ) -> None:
        """Raise ValueError unless K and V of `dtype` can be stored: as they are, or in 8 bits by
        those who know the dtypes `quantized`.
        """
        if self.values.dtype not in (dtype, *quantized):
            raise ValueError(
                f"K and V are {dtype} and the pool is {self.values.dtype}; it must have their "
                f"dtype or {' or '.join(str(each).removeprefix('torch.') for each in quantized)}"
            )


def quantize_vectors(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """K or V of tokens and heads in 8 bits, as every implementation stores them.

    x: float32 [..., head_dim]; dtype: one of QUANTIZED. Returns [..., head_dim] of it and float32
    [...], with x ≈ values * scale: scales are the largest magnitudes / the largest number, or 1
    where all are 0, and halves are rounded to even.
    """
    largest = QUANTIZED[dtype]
    scales = x.abs().amax(dim=-1) / largest
    scales.masked_fill_(scales == 0, 1)
    values = x / scales[..., None]
    if dtype is torch.int8:
        return values.round_().to(dtype), scales
    # A quotient may round to more than the largest number, which would become NaN.
    return values.clamp_(-largest, largest).to(dtype), scales
