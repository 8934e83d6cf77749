"""LoRA on segments of tokens against float64, adapter by adapter."""

import pytest
import torch
from paged_case import TOLERANCE, assert_close

from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.lora_expand import lora_expand
from pagewire.kernels.gpu.lora_segments import NO_ADAPTER, LoraSegments
from pagewire.kernels.gpu.lora_shrink import lora_shrink


def segments_of(lengths: list[int], adapters: list[int]) -> LoraSegments:
    starts = torch.tensor([0, *lengths]).cumsum(dim=0)
    return LoraSegments(
        starts=starts.int(),
        adapters=torch.tensor(adapters, dtype=torch.int32),
        max_tokens=max(lengths),
    )


@pytest.mark.parametrize(
    ("lengths", "adapters", "rank", "dtype"),
    [
        ([1, 1, 1, 1], [2, NO_ADAPTER, 0, 2], 8, torch.bfloat16),
        ([1, 18, 3, 70], [1, NO_ADAPTER, 0, 2], 16, torch.float32),
        ([5, 0, 2], [1, 0, 2], 64, torch.float16),
        ([2], [0], 5, torch.float32),
    ],
    ids=str,
)
def test_changes_of_all_adapters(
    lengths: list[int], adapters: list[int], rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_tokens, num_inputs, num_outputs = sum(lengths), 160, 200
    x = torch.randn(num_tokens, num_inputs).to(dtype)
    a = torch.randn(3, rank, num_inputs).to(dtype)
    b = torch.randn(3, rank, num_outputs).to(dtype)
    out = torch.randn(num_tokens, num_outputs).to(dtype)
    scales = torch.tensor([0.5, 2.0, -1.0])
    expected = out.double()
    ends = torch.tensor(lengths).cumsum(dim=0).tolist()
    for length, end, adapter in zip(lengths, ends, adapters, strict=True):
        if adapter != NO_ADAPTER:
            rows = slice(end - length, end)
            change = x[rows].double() @ a[adapter].double().T @ b[adapter].double()
            expected[rows] += scales[adapter].double() * change

    before, segments = out.clone(), segments_of(lengths, adapters)
    lora_expand(lora_shrink(x, a, segments), b, scales, segments, out)

    # The intermediate result is rounded to the dtype once, as if two layers had computed it.
    assert_close(out, expected, TOLERANCE[dtype])
    for length, end, adapter in zip(lengths, ends, adapters, strict=True):
        if adapter == NO_ADAPTER:
            assert torch.equal(out[end - length : end], before[end - length : end])


def test_a_token_has_the_same_change_in_every_batch() -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(9, 160), torch.randn(2, 8, 160), torch.randn(2, 8, 40)
    scales, alone, together = torch.ones(2), torch.zeros(1, 40), torch.zeros(9, 40)
    one = segments_of([1], [1])
    lora_expand(lora_shrink(x[4:5], a, one), b, scales, one, alone)
    all_of_them = segments_of([3, 6], [0, 1])
    lora_expand(lora_shrink(x, a, all_of_them), b, scales, all_of_them, together)
    assert torch.equal(alone[0], together[4])


def test_what_does_not_fit_is_refused() -> None:
    segments = segments_of([2], [0])
    x, a, b = torch.ones(2, 32), torch.ones(1, 8, 32), torch.ones(1, 8, 48)
    with pytest.raises(KernelArgumentError, match=r"a is \[1, 8, 31\]; give \[any, any, 32\]"):
        lora_shrink(x, a[..., :31], segments)
    y = lora_shrink(x, a, segments)
    with pytest.raises(KernelArgumentError, match=r"out is torch\.float16"):
        lora_expand(y, b, torch.ones(1), segments, torch.ones(2, 48).half())
    with pytest.raises(KernelArgumentError, match=r"y is \[8, 2, 16\]; give \[8, 3, 16\]"):
        lora_expand(y, b, torch.ones(1), segments, torch.ones(3, 48))
    with pytest.raises(KernelArgumentError, match=r"starts is \[3\]; give \[2\]"):
        LoraSegments(
            starts=torch.zeros(3, dtype=torch.int32), adapters=segments.adapters, max_tokens=1
        )
