"""The kernels that a step spends its time in, each with random inputs, an oracle and a floor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_stages.scale import KernelSizes, Scale
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.models.rope import cosine_and_sine, inverse_frequencies
from pagewire.kernels import reference
from pagewire.kernels.gpu.activation_quant import quantize_tokens
from pagewire.kernels.gpu.fp8_matmul import fp8_matmul
from pagewire.kernels.gpu.pages import PagePart, gather_pages
from pagewire.kernels.gpu.sampling import TritonSamplingPlan
from pagewire.kernels.gpu.w8a8_matmul import w8a8_matmul
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import Activation, AttentionBatch, Ops, SamplingRows
from pagewire.kv_transfer.layout import KVLayout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelCase:
    """One kernel on one set of inputs."""

    name: str
    run: Callable[[], Activation]
    expected: Callable[[], Tensor]  # float64, or integers that must be the same
    num_bytes: float  # that must be read and written
    flops: float  # of its matrix products
    max_ratio: float  # to the floor


def kernel_cases(scale: Scale, sizes: KernelSizes, ops: Ops) -> Iterator[KernelCase]:
    """Fresh inputs of the given sizes."""
    yield from attention_cases(scale, sizes, ops)
    yield _rope_and_store(scale, ops, sizes.num_tokens)
    yield _rms_norm(scale, ops, sizes.num_tokens)
    yield _silu_mul(scale, ops, sizes.num_tokens)
    yield _gather(scale, sizes.num_pages)
    yield _sampling(scale, sizes.num_rows)
    # Against the rate of 16 bits, of which they must be so many times.
    yield _matmul(scale, sizes.num_tokens, torch.int8, faster=1.3)
    if scale.device == "cuda":
        yield _matmul(scale, sizes.num_tokens, torch.float8_e4m3fn, faster=1.6)


def attention_cases(scale: Scale, sizes: KernelSizes, ops: Ops) -> Iterator[KernelCase]:
    """Those of attention alone."""
    yield _attention(scale, ops, "decode attention", [(1, sizes.context_len)] * sizes.num_rows)
    yield _attention(scale, ops, "prefill attention", [(sizes.chunk_len, sizes.chunk_len)])


def _randn(scale: Scale, *shape: int) -> Tensor:
    return torch.randn(*shape, device=scale.device, dtype=torch.float32).to(scale.torch_dtype)


def _pool(scale: Scale, num_pages: int, num_layers: int) -> KVCache:
    """Pages of random numbers."""
    model = scale.model
    layout = KVLayout(
        page_size=scale.page_size,
        num_layers=num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=scale.dtype,
    )
    cache = KVCache(layout, num_pages, scale.device)
    cache.pages.values.normal_()
    return cache


def _attention(scale: Scale, ops: Ops, name: str, rows: list[tuple[int, int]]) -> KernelCase:
    """rows: (tokens, context that ends with them)."""
    model, page_size, device = scale.model, scale.page_size, scale.device
    pages_per_row = -(-max(context for _, context in rows) // page_size)
    pool = _pool(scale, len(rows) * pages_per_row, 1).pages
    lens = torch.tensor([num_tokens for num_tokens, _ in rows])
    num_tokens = int(lens.sum())
    batch = AttentionBatch(
        cu_seqlens=torch.cat((torch.zeros(1), lens.cumsum(0))).int().to(device),
        context_lens=torch.tensor([c for _, c in rows], dtype=torch.int32, device=device),
        page_table=torch.randperm(len(pool.values), dtype=torch.int32)
        .view(len(rows), pages_per_row)
        .to(device),
        positions=torch.cat([torch.arange(c - n, c) for n, c in rows]).to(device),
        slots=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        page_size=page_size,
    )
    q = _randn(scale, num_tokens, model.num_heads, model.head_dim)
    softmax_scale = model.head_dim**-0.5
    plan = ops.plan_attention(batch, scale=softmax_scale, window=None)
    pairs = sum(n * (2 * c - n + 1) / 2 for n, c in rows)  # of queries and keys
    kv_values = sum(c for _, c in rows) * 2 * model.num_kv_heads * model.head_dim
    compute_bound = num_tokens > len(rows)
    return KernelCase(
        name=name,
        run=lambda: plan.run(q, pool, 0),
        expected=lambda: torch.cat(
            [
                reference.attention(
                    part.cpu(), *_context(pool, batch, row, c), scale=softmax_scale, window=None
                )
                for row, (part, (_, c)) in enumerate(
                    zip(torch.split(q, lens.tolist()), rows, strict=True)
                )
            ]
        ),
        num_bytes=kv_values * q.itemsize,
        flops=4 * pairs * model.num_heads * model.head_dim if compute_bound else 0,
        max_ratio=2.0 if compute_bound else 1.25,
    )


def _context(pool: KVPool, batch: AttentionBatch, row: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V of a row, [length, num_kv_heads, head_dim] each."""
    pages = pool.values[batch.page_table[row].long(), 0].cpu()
    kv = pages.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
    return kv[0], kv[1]


def _rope_and_store(scale: Scale, ops: Ops, num_tokens: int) -> KernelCase:
    model, device = scale.model, scale.device
    cache = _pool(scale, -(-num_tokens // scale.page_size), 1)
    pool = cache.pages
    q, k, v = (
        _randn(scale, num_tokens, heads, model.head_dim)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    )
    positions = torch.arange(num_tokens, device=device)
    frequencies = inverse_frequencies(model)
    rope = cosine_and_sine(positions, frequencies.to(device))
    return KernelCase(
        name="RoPE and KV write",
        run=lambda: ops.rope_and_store(q, k, v, rope, pool, 0, positions),
        expected=lambda: reference.rope(q.cpu(), positions.cpu(), frequencies),
        num_bytes=2 * (q.nbytes + k.nbytes + v.nbytes) + 2 * rope[0].nbytes,
        flops=0,
        max_ratio=1.3,
    )


def _rms_norm(scale: Scale, ops: Ops, num_tokens: int) -> KernelCase:
    x, residual = (_randn(scale, num_tokens, scale.model.hidden_size) for _ in range(2))
    weight = _randn(scale, scale.model.hidden_size)
    total = (x.float() + residual.float()).to(x.dtype)
    return KernelCase(
        name="residual and RMSNorm",
        run=lambda: ops.add_rms_norm(x, residual, weight, 1e-5)[0],
        expected=lambda: reference.rms_norm(total.cpu(), weight.cpu(), 1e-5),
        num_bytes=4 * x.nbytes,
        flops=0,
        max_ratio=1.2,
    )


def _silu_mul(scale: Scale, ops: Ops, num_tokens: int) -> KernelCase:
    gate_up = _randn(scale, num_tokens, 2 * scale.model.intermediate_size)
    return KernelCase(
        name="SwiGLU",
        run=lambda: ops.silu_mul(gate_up),
        expected=lambda: reference.silu_mul(*gate_up.cpu().chunk(2, dim=-1)),
        num_bytes=1.5 * gate_up.nbytes,
        flops=0,
        max_ratio=1.15,
    )


def _gather(scale: Scale, num_pages: int) -> KernelCase:
    cache = _pool(scale, num_pages, scale.model.num_layers)
    page_bytes = cache.layout.page_bytes
    pages = torch.randperm(num_pages, dtype=torch.int32).to(scale.device)
    whole = PagePart(offset=0, num_layers=1, layer_bytes=page_bytes, run_bytes=page_bytes)
    return KernelCase(
        name="page gather",
        run=lambda: gather_pages(cache.pool, pages, whole),
        expected=lambda: cache.pool[pages.long()][:, None].cpu(),
        num_bytes=2 * num_pages * page_bytes,
        flops=0,
        max_ratio=1.2,
    )


def _sampling(scale: Scale, num_rows: int) -> KernelCase:
    """Of the one token that top-k leaves, by every pass that a draw among many takes."""
    vocab_size, device = scale.model.vocab_size, scale.device
    logits = torch.randn(num_rows, vocab_size, device=device)
    ones = torch.ones(num_rows, device=device)
    rows = SamplingRows(
        temperature=ones,
        top_k=ones.long(),
        top_p=0.9 * ones.double(),
        min_p=0 * ones,
        vocab_size=vocab_size,
    )
    plan = TritonSamplingPlan(rows)
    uniform = torch.rand(num_rows, dtype=torch.float64, device=device)
    return KernelCase(
        name="sampling",
        run=lambda: plan.run(logits, uniform),
        expected=lambda: logits.cpu().argmax(dim=-1),
        num_bytes=logits.nbytes,
        flops=0,
        max_ratio=2.0,
    )


def _matmul(scale: Scale, num_tokens: int, dtype: torch.dtype, *, faster: float) -> KernelCase:
    """The products of the gate and up matrix in 8 bits, with activations that already are so."""
    num_inputs, num_outputs = scale.model.hidden_size, 2 * scale.model.intermediate_size
    x, x_scales = quantize_tokens(_randn(scale, num_tokens, num_inputs), dtype)
    weight, weight_scales = quantize_tokens(_randn(scale, num_outputs, num_inputs), dtype)

    def run() -> Tensor:
        if dtype is torch.int8:
            return w8a8_matmul(x, x_scales, weight, weight_scales, scale.torch_dtype)
        return fp8_matmul(x, x_scales, weight, weight_scales)

    def restored(values: Tensor, scales: Tensor) -> Tensor:
        return values.cpu().double() * scales.cpu().double()[:, None]

    return KernelCase(
        name=f"matrix product in {str(dtype).removeprefix('torch.')}",
        run=run,
        expected=lambda: restored(x, x_scales) @ restored(weight, weight_scales).T,
        num_bytes=x.nbytes + weight.nbytes,
        flops=2 * num_tokens * num_inputs * num_outputs,
        max_ratio=1 / faster,
    )
