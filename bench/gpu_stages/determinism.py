"""Stage 6: `deterministic` gives tokens the same bits in every batch and chunk; what it costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_stages.cases.kernel_case import Setting, error, same_bytes
from gpu_stages.items import Item
from gpu_stages.measurement import Measurement
from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import Scale
from gpu_stages.timing import median_ms
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.experts import route
from pagewire.kernels.gpu.grouped_experts import group_experts
from pagewire.kernels.gpu.invariant_matmul import invariant_matmul
from pagewire.kernels.ops import AttentionBatch, Ops
from pagewire.kernels.select import Kernels, select_ops

NUM_LAYERS = 2
MAX_PROMPT = 300  # tokens
BATCHES = (1, 2, 7, 16, 33, 64, 65, 129)  # tokens of a product, about the sizes of its tiles


def items(scale: Scale) -> Iterator[Item]:
    for dtype in (scale.dtype, "float32"):
        variant = replace(scale, dtype=dtype)
        yield Item(name=f"rows of a product, {dtype}", measure=partial(_rows, variant))
        yield Item(name=f"experts, {dtype}", measure=partial(_experts, variant))
        yield Item(name=f"attention, {dtype}", measure=partial(_attention, variant))
        yield Item(name=f"model, {dtype}", measure=partial(_model, variant))
    for num_tokens in (scale.timed.num_rows, scale.timed.num_tokens):
        yield Item(name=f"time of {num_tokens} tokens", measure=partial(_times, scale, num_tokens))


def _different(name: str, value: Tensor, expected: Tensor) -> Measurement:
    """How many bytes are others."""
    return Measurement(
        name=f"{name}: bytes that differ",
        value=error(same_bytes(value), same_bytes(expected)),
        unit="",
        limit=0.0,
    )


def _rows(scale: Scale) -> Iterator[Measurement]:
    x, weight = _product_inputs(scale, sum(BATCHES))
    multiply = partial(invariant_matmul, weight=weight, bias=None, dtype=torch.float32)
    parts = [multiply(rows) for rows in torch.split(x, list(BATCHES))]
    yield _different(
        f"product of {min(BATCHES)} to {max(BATCHES)} tokens and of all in {scale.dtype}",
        torch.cat(parts),
        multiply(x),
    )


def _experts(scale: Scale) -> Iterator[Measurement]:
    torch.manual_seed(0)
    sizes, num_tokens = scale.mixture, sum(BATCHES)
    size, hidden = sizes.intermediate_size, sizes.hidden_size
    gate_up, down, x = (
        torch.randn(*shape, device=scale.device).to(scale.torch_dtype)
        for shape in (
            (sizes.num_experts, 2 * size, hidden),
            (sizes.num_experts, hidden, size),
            (num_tokens, hidden),
        )
    )
    scores = torch.randn(num_tokens, sizes.num_experts, device=scale.device)
    experts = group_experts(gate_up.unbind(), down.unbind(), invariant=True)

    def run(part: slice) -> Tensor:
        return experts(x[part], route(scores[part], sizes.top_k, renormalize=True))

    ends = [0, *accumulate(BATCHES)]
    parts = [run(slice(start, end)) for start, end in pairwise(ends)]
    yield _different(
        f"experts of {min(BATCHES)} to {max(BATCHES)} tokens and of all in {scale.dtype}",
        torch.cat(parts),
        run(slice(None)),
    )


def _product_inputs(scale: Scale, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Of the largest matrix of a layer."""
    torch.manual_seed(0)
    num_inputs, num_outputs = scale.model.hidden_size, 2 * scale.model.intermediate_size
    x, weight = (
        torch.randn(rows, num_inputs, device=scale.device).to(scale.torch_dtype)
        for rows in (num_tokens, num_outputs)
    )
    return x, weight


def _times(scale: Scale, num_tokens: int) -> Iterator[Measurement]:
    x, weight = _product_inputs(scale, num_tokens)

    def invariant() -> Tensor:
        return invariant_matmul(x, weight, None, dtype=x.dtype)

    yield Measurement(
        name=f"product of {num_tokens} tokens, against torch's",
        value=median_ms([invariant], scale.device),
        unit="ms",
        floor=median_ms([lambda: F.linear(x, weight)], scale.device),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prompt:
    """The queries of a prompt and the pages of its KV."""

    q: Tensor  # [num_tokens, num_heads, head_dim]
    cache: KVCache
    pages: Tensor  # int32 [num_pages]
    ops: Ops

    def attend(self, *parts: range) -> Tensor:
        """Attention of parts of the prompt as the rows of one step, behind one another."""
        q = torch.cat([self.q[part.start : part.stop] for part in parts])
        device, page_size = q.device, self.cache.layout.page_size
        starts = torch.tensor([0, *(len(part) for part in parts)], device=device)
        positions = torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(device)
        batch = AttentionBatch(
            cu_seqlens=starts.cumsum(0).int(),
            context_lens=torch.tensor([part.stop for part in parts], device=device).int(),
            page_table=self.pages.repeat(len(parts), 1),
            positions=positions,
            slots=self.pages[positions // page_size] * page_size + positions % page_size,
            page_size=page_size,
        )
        plan = self.ops.plan_attention(batch, scale=q.shape[-1] ** -0.5, window=None)
        return plan.run(q, self.cache.pages, 0)


def _attention(scale: Scale) -> Iterator[Measurement]:
    torch.manual_seed(0)
    ops = select_ops(Kernels.TRITON, scale.device, deterministic=True).ops
    setting = Setting(scale=scale, sizes=scale.timed, ops=ops)
    length = min(MAX_PROMPT, setting.sizes.chunk_len)
    num_pages = -(-length // scale.page_size)
    prompt = _Prompt(
        q=setting.randn(length, scale.model.num_heads, scale.model.head_dim),
        cache=setting.cache(num_pages, 1),
        pages=setting.permutation(num_pages),
        ops=ops,
    )
    whole = prompt.attend(range(length))
    ends = (1, length // 3, length // 2 + 1, length)
    chunks = [range(*each) for each in pairwise((0, *ends))]
    alone = torch.cat([prompt.attend(chunk) for chunk in chunks])
    yield _different(f"attention in chunks in {scale.dtype}", alone, whole)
    together = prompt.attend(*chunks)
    yield _different(f"attention of chunks in one batch in {scale.dtype}", together, whole)
    positions = sorted({0, length // 2, length - 2, length - 1})
    tokens = prompt.attend(*(range(each, each + 1) for each in positions))
    yield _different(f"attention of single tokens in {scale.dtype}", tokens, whole[positions])


def _model(scale: Scale) -> Iterator[Measurement]:
    """Layers as wide as the model's, few of them, whose decode steps are recorded."""
    scale = replace(scale, model=replace(scale.model, num_layers=NUM_LAYERS))
    length, num_rows = min(MAX_PROMPT, scale.prefill[0]), scale.timed.num_rows
    pages_per_row = -(-length // scale.page_size)
    model = random_model(scale, deterministic=True)
    runner = runner_of(model, scale, num_rows * pages_per_row)
    runner.warm_up(num_rows)
    tokens = [
        [(31 * place + 7 * index) % runner.vocab_size for index in range(length - place)]
        for place in range(num_rows)
    ]

    def row(place: int, start: int, end: int | None = None) -> BatchRow:
        return BatchRow(
            request_id=str(place),
            token_ids=tokens[place][start:end],
            start=start,
            page_table=range(place * pages_per_row, (place + 1) * pages_per_row),
            sampling=SamplingParams(),
        )

    whole = torch.cat([_logits(runner, [row(place, 0)]) for place in range(num_rows)])
    together = _logits(runner, [row(place, 0) for place in range(num_rows)])
    yield _different(f"logits of prompts in one batch in {scale.dtype}", together, whole)
    cuts = (length // 4, length // 2 + 1)
    for start, end in pairwise((0, *cuts)):
        _logits(runner, [row(0, start, end)])
    chunked = _logits(runner, [row(0, cuts[-1])])
    yield _different(f"logits of a prompt in chunks in {scale.dtype}", chunked, whole[:1])
    last = [row(place, len(tokens[place]) - 1) for place in range(num_rows)]
    yield _different(f"logits of decode in a batch in {scale.dtype}", _logits(runner, last), whole)
    alone = torch.cat([_logits(runner, [each]) for each in last])
    yield _different(f"logits of decode alone in {scale.dtype}", alone, whole)


def _logits(runner: ModelRunner, rows: Sequence[BatchRow]) -> Tensor:
    return runner.forward(Batch(rows=tuple(rows))).clone()  # the next step uses its memory
