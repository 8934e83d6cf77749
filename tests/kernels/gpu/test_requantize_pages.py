"""Pages from floats to 8 bits: the bytes that a pool in 8 bits would hold anyway."""

import pytest
import torch

from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.requantize_pages import requantize_pages
from pagewire.kernels.kv_pool import QUANTIZED, KVPool, quantize_vectors

SHAPE = {"num_layers": 2, "num_kv_heads": 3, "page_size": 16, "head_dim": 32}


def pool(num_pages: int, dtype: torch.dtype, **shape: int) -> KVPool:
    """Filled with bytes of 255, which are NaN in floats and scales."""
    shape = SHAPE | shape
    vector_bytes = shape["head_dim"] * dtype.itemsize + (4 if dtype in QUANTIZED else 0)
    page_bytes = shape["num_layers"] * shape["num_kv_heads"] * 2 * shape["page_size"] * vector_bytes
    data = torch.full((num_pages, page_bytes), 255, dtype=torch.uint8)
    return KVPool(data, dtype, **shape)


def pages(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("eight_bits", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pages_are_quantized_as_tokens_are(dtype: torch.dtype, eight_bits: torch.dtype) -> None:
    torch.manual_seed(0)
    source, target = pool(4, dtype), pool(3, eight_bits)
    source.values[:] = torch.randn(source.values.shape).to(dtype)
    source.values[1, 0, 2, 1, 5] = 0
    requantize_pages(source, target, pages(1, 3), pages(2, 0))
    values, scales = quantize_vectors(source.values[[1, 3]].float(), eight_bits)
    assert target.scales is not None
    assert torch.equal(target.values.view(torch.uint8)[[2, 0]], values.view(torch.uint8))
    assert torch.equal(target.scales[[2, 0]], scales)
    assert bool(target.scales[1].isnan().all())  # a page that nobody named


def test_what_does_not_fit_is_refused() -> None:
    floats, int8 = pool(2, torch.float32), pool(2, torch.int8)
    with pytest.raises(KernelArgumentError, match="source is in 8 bits"):
        requantize_pages(int8, int8, pages(0), pages(0))
    with pytest.raises(KernelArgumentError, match="target is a pool in floats"):
        requantize_pages(floats, floats, pages(0), pages(0))
    with pytest.raises(KernelArgumentError, match="re-tile them first"):
        requantize_pages(floats, pool(2, torch.int8, page_size=32), pages(0), pages(0))
    with pytest.raises(KernelArgumentError, match=r"target_pages is \[2\]; give \[1\]"):
        requantize_pages(floats, int8, pages(0), pages(0, 1))
