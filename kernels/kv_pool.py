"""The KV cache as operations see it: keys and values of every page, in floats or in 8 bits.

The bytes are those that workers exchange, in the layout of `KVLayout`.
"""

import torch
from torch import Tensor

_SCALE = torch.float32


class KVPool:
    """Views of one byte pool: for each page, layer and KV head a segment of K, then V.

    In 8 bits each K and each V of a token and head is values * scale, as `quantize_vectors`
    makes them, and the scales of a segment lie behind its values.
    """

    __slots__ = ("scales", "segment_bytes", "values")

    values: Tensor  # [num_pages, num_layers, num_kv_heads, 2 (K, V), page_size, head_dim]
    scales: Tensor | None  # float32 [num_pages, num_layers, num_kv_heads, 2, page_size], for int8
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
        """data: uint8 [num_pages, page_bytes], contiguous; dtype: of floats, or int8.

        Raises ValueError when `data` does not hold such pages.
        """
        vector_bytes = head_dim * dtype.itemsize
        if dtype is torch.int8:
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
        if dtype is torch.int8:
            scales = segments.view(_SCALE)[..., num_values // _SCALE.itemsize :]
            self.scales = scales.view(*heads, 2, page_size)

    def require(self, dtype: torch.dtype) -> None:
        """Raise ValueError unless K and V of `dtype` can be stored: its own, or any as int8."""
        if self.scales is None and self.values.dtype is not dtype:
            raise ValueError(
                f"K and V are {dtype} and the pool is {self.values.dtype}; "
                "it must have their dtype or int8"
            )


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """K or V of tokens and heads in 8 bits, as every implementation stores them.

    x: float32 [..., head_dim]. Returns int8 [..., head_dim] and float32 [...], with
    x ≈ values * scale: scales are the largest magnitudes / 127, or 1 where all are 0, and halves
    are rounded to even.
    """
    scales = x.abs().amax(dim=-1) / 127
    scales.masked_fill_(scales == 0, 1)
    return (x / scales[..., None]).round_().to(torch.int8), scales
