"""Attention over pages in floats and in 8 bits, and what writes K and V into them."""

from functools import partial

import torch
from torch import Tensor

from gpu_stages.cases.kernel_case import KernelCase, NamedCase, Setting, same_bytes
from pagewire.engine.models.rope import cosine_and_sine, inverse_frequencies
from pagewire.kernels import reference
from pagewire.kernels.kv_pool import KVPool, quantize_vectors
from pagewire.kernels.ops import AttentionBatch

SLOWEST_PREFILL = 2.0  # times what a large product takes: about 400 TFLOP/s of an H100
FP8 = "float8_e4m3fn"


def decode_case(setting: Setting, *, dtype: str | None = None) -> KernelCase:
    """One token a row, each behind a context."""
    rows = [(1, setting.sizes.context_len)] * setting.sizes.num_rows
    return _attention(setting, rows, dtype, max_ratio=1.35 if dtype else 1.25)


def ragged_case(setting: Setting) -> KernelCase:
    """Contexts that end about the end of a page, and one of a single token."""
    page_size = setting.scale.page_size
    lengths = (1, page_size - 1, page_size, page_size + 1)
    return _attention(setting, [(1, length) for length in lengths], None, max_ratio=None)


def prefill_case(setting: Setting, *, dtype: str | None = None) -> KernelCase:
    """A whole prompt."""
    length = setting.sizes.chunk_len
    return _attention(setting, [(length, length)], dtype, max_ratio=SLOWEST_PREFILL)


def chunks_case(setting: Setting) -> KernelCase:
    """Chunks behind what is in pages already, beside a decode step."""
    length = setting.sizes.chunk_len
    rows = [(length // 2, length), (length // 3, length // 2), (1, length)]
    return _attention(setting, rows, None, max_ratio=SLOWEST_PREFILL)


def rope_case(setting: Setting) -> KernelCase:
    """The rotated q; what the pool holds is read only where results are checked."""
    scale, num_tokens = setting.scale, setting.sizes.num_tokens
    model = scale.model
    pool = setting.cache(-(-num_tokens // scale.page_size), 1).pages
    pool.values.fill_(torch.nan)
    q, k, v = (
        setting.randn(num_tokens, heads, model.head_dim)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    )
    positions = torch.arange(num_tokens, device=scale.device)
    frequencies = inverse_frequencies(model)
    rope = cosine_and_sine(positions, frequencies.to(scale.device))

    def read(rotated: Tensor) -> Tensor:
        stored = pool.values[:, 0].permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :num_tokens]
        return torch.cat((rotated.flatten(), stored.flatten()))

    def expected() -> Tensor:
        turned = (reference.rope(x.cpu(), positions.cpu(), frequencies) for x in (q, k))
        return torch.cat([x.flatten() for x in (*turned, v.cpu().double())])

    return KernelCase(
        run=lambda: setting.ops.rope_and_store(q, k, v, rope, pool, 0, positions),
        read=read,
        expected=expected,
        num_bytes=2 * (q.nbytes + k.nbytes + v.nbytes) + 2 * rope[0].nbytes,
        max_ratio=1.3,
    )


def quantized_store_case(setting: Setting, *, dtype: str) -> KernelCase:
    """K and V of position 0, which nothing turns, in 8 bits."""
    scale, num_tokens = setting.scale, setting.sizes.num_tokens
    model = scale.model
    pool = setting.cache(-(-num_tokens // scale.page_size), 1, dtype).pages
    q, k, v = (setting.randn(num_tokens, model.num_kv_heads, model.head_dim) for _ in range(3))
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=scale.device)
    rope = cosine_and_sine(positions, inverse_frequencies(model).to(scale.device))
    slots = torch.arange(num_tokens, device=scale.device)

    def read(rotated: Tensor) -> Tensor:
        assert pool.scales is not None
        values = pool.values[:, 0].permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :num_tokens]
        scales = pool.scales[:, 0].permute(2, 0, 3, 1).flatten(1, 2)[:, :num_tokens]
        return same_bytes(values, scales)

    vector_bytes = model.num_kv_heads * (model.head_dim + 4)
    return KernelCase(
        run=lambda: setting.ops.rope_and_store(q, k, v, rope, pool, 0, slots),
        read=read,
        expected=lambda: same_bytes(
            *quantize_vectors(torch.stack((k, v)).float().cpu(), pool.values.dtype)
        ),
        num_bytes=2 * q.nbytes + k.nbytes + v.nbytes + 2 * num_tokens * vector_bytes,
        max_ratio=1.3,
    )


CHECKED = (NamedCase(name="decode attention, ends of pages", make=ragged_case),)
CASES = (
    NamedCase(name="decode attention", make=decode_case),
    NamedCase(name="decode attention, int8 KV", make=partial(decode_case, dtype="int8")),
    NamedCase(
        name="decode attention, fp8 KV", make=partial(decode_case, dtype=FP8), needs_fp8=True
    ),
    NamedCase(name="prefill attention", make=prefill_case),
    NamedCase(name="prefill attention, chunks", make=chunks_case),
    NamedCase(name="prefill attention, int8 KV", make=partial(prefill_case, dtype="int8")),
    NamedCase(
        name="prefill attention, fp8 KV", make=partial(prefill_case, dtype=FP8), needs_fp8=True
    ),
    NamedCase(name="RoPE and KV write", make=rope_case),
    NamedCase(name="KV write in int8", make=partial(quantized_store_case, dtype="int8")),
    NamedCase(
        name="KV write in fp8", make=partial(quantized_store_case, dtype=FP8), needs_fp8=True
    ),
)


def _attention(
    setting: Setting, rows: list[tuple[int, int]], dtype: str | None, *, max_ratio: float | None
) -> KernelCase:
    """rows: (tokens, context that ends with them)."""
    scale = setting.scale
    model = scale.model
    batch = _batch(setting, rows)
    num_rows, pages_per_row = batch.page_table.shape
    pool = setting.cache(num_rows * pages_per_row, 1, dtype).pages
    lens = [num_tokens for num_tokens, _ in rows]
    q = setting.randn(sum(lens), model.num_heads, model.head_dim)
    softmax_scale = model.head_dim**-0.5
    plan = setting.ops.plan_attention(batch, scale=softmax_scale, window=None)

    def expected() -> Tensor:
        parts = zip(torch.split(q.cpu(), lens), _contexts(pool, batch), strict=True)
        return torch.cat(
            [reference.attention(part, *kv, scale=softmax_scale, window=None) for part, kv in parts]
        )

    pairs = sum(n * (2 * c - n + 1) / 2 for n, c in rows)  # of queries and keys
    vector_bytes = pool.segment_bytes / (2 * scale.page_size)
    is_prefill = sum(lens) > num_rows
    return KernelCase(
        run=lambda: plan.run(q, pool, 0),
        expected=expected,
        num_bytes=sum(c for _, c in rows) * 2 * model.num_kv_heads * vector_bytes,
        flops=4 * pairs * model.num_heads * model.head_dim if is_prefill else 0,
        max_ratio=max_ratio,
    )


def _batch(setting: Setting, rows: list[tuple[int, int]]) -> AttentionBatch:
    scale = setting.scale
    pages_per_row = -(-max(context for _, context in rows) // scale.page_size)
    starts = torch.tensor([0, *(n for n, _ in rows)]).cumsum(0)
    return AttentionBatch(
        cu_seqlens=starts.int().to(scale.device),
        context_lens=torch.tensor([c for _, c in rows], dtype=torch.int32, device=scale.device),
        page_table=setting.permutation(len(rows) * pages_per_row).view(len(rows), -1),
        positions=torch.cat([torch.arange(c - n, c) for n, c in rows]).to(scale.device),
        slots=torch.zeros(int(starts[-1]), dtype=torch.int64, device=scale.device),
        page_size=scale.page_size,
    )


def _contexts(pool: KVPool, batch: AttentionBatch) -> list[tuple[Tensor, Tensor]]:
    """K and V of each row, float64 [context_len, num_kv_heads, head_dim] each."""
    contexts = []
    for pages, length in zip(batch.page_table.long(), batch.context_lens.tolist(), strict=True):
        kv = pool.values[pages, 0].cpu().double()
        if pool.scales is not None:
            kv *= pool.scales[pages, 0].cpu().double()[..., None]
        # [pages, num_kv_heads, 2, page_size, head_dim]
        k, v = kv.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
        contexts.append((k, v))
    return contexts
