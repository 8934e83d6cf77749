"""Attention of a decode step over a KV cache in float32, bfloat16 and int8.

All layers of the default model's shape, contexts of 1,000 tokens on pages in random order, one
thread. The dtypes take turns in one run. Counted is the processor's time, which other processes on
the machine disturb less than the clock's; the figures are medians over the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness.table import markdown_table, number
from pagewire.engine.kv_cache import KVCache
from pagewire.kernels.ops import AttentionBatch, Ops
from pagewire.kernels.select import Kernels, select_ops
from pagewire.kv_transfer.layout import KVLayout

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 30, 9, 3, 64
PAGE_SIZE = 64
CONTEXT_LEN = 1000
BATCH_SIZES = (1, 8, 32)
# Of the KV cache, and of the queries over it.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One dtype at one batch size."""

    batch_size: int
    kv_cache_dtype: str
    step_ms: float  # processor time, all layers
    kv_mb: float  # that the step reads


def layout_of(dtype: str) -> KVLayout:
    return KVLayout(
        page_size=PAGE_SIZE,
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )


def random_cache(dtype: str, num_pages: int) -> KVCache:
    """A cache whose values are about normally distributed."""
    cache = KVCache(layout_of(dtype), num_pages)
    pool = cache.pages
    page = torch.randn(pool.values.shape[1:])
    if pool.scales is not None:
        page *= 40
        pool.scales.fill_(1 / 40)
    pool.values.copy_(page.clamp(-127, 127).to(pool.values.dtype).expand(pool.values.shape))
    return cache


def decode_step(ops: Ops, dtype: str, batch_size: int) -> Callable[[], None]:
    """What runs the attention of one step."""
    pages_per_row = -(-CONTEXT_LEN // PAGE_SIZE)
    num_pages = batch_size * pages_per_row
    pool = random_cache(dtype, num_pages).pages
    batch = AttentionBatch(
        cu_seqlens=torch.arange(batch_size + 1, dtype=torch.int32),
        context_lens=torch.full((batch_size,), CONTEXT_LEN, dtype=torch.int32),
        page_table=torch.randperm(num_pages, dtype=torch.int32).view(batch_size, pages_per_row),
        positions=torch.full((batch_size,), CONTEXT_LEN - 1),
        slots=torch.zeros(batch_size, dtype=torch.int64),
        page_size=PAGE_SIZE,
    )
    q = torch.randn(batch_size, NUM_HEADS, HEAD_DIM).to(DTYPES[dtype])

    def run() -> None:
        plan = ops.plan_attention(batch, scale=HEAD_DIM**-0.5, window=None)
        for layer in range(NUM_LAYERS):
            plan.run(q, pool, layer)

    return run


def measure(ops: Ops, batch_size: int, rounds: int) -> list[Figure]:
    """Every dtype at one batch size."""
    steps = {dtype: decode_step(ops, dtype, batch_size) for dtype in DTYPES}
    times: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for _ in range(rounds):
        for dtype, step in steps.items():
            start = time.process_time()
            step()
            times[dtype].append(time.process_time() - start)
    return [figure(dtype, batch_size, statistics.median(times[dtype])) for dtype in DTYPES]


def figure(dtype: str, batch_size: int, step_s: float) -> Figure:
    return Figure(
        batch_size=batch_size,
        kv_cache_dtype=dtype,
        step_ms=step_s * 1e3,
        kv_mb=batch_size * CONTEXT_LEN * layout_of(dtype).page_bytes / PAGE_SIZE / 1e6,
    )


def table(figures: list[Figure]) -> str:
    """One row a batch size and dtype; times also relative to bfloat16 at the same batch size."""
    bfloat16 = {
        each.batch_size: each.step_ms for each in figures if each.kv_cache_dtype == "bfloat16"
    }
    rows = [
        [
            str(each.batch_size),
            each.kv_cache_dtype,
            number(each.step_ms),
            number(each.step_ms / bfloat16[each.batch_size], digits=2),
            number(each.kv_mb),
        ]
        for each in figures
    ]
    return markdown_table(["batch", "KV cache", "ms", "to bfloat16", "KV (MB)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 rounds at batches 1 and 8")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    selected = select_ops(Kernels.AUTO, "cpu")
    print(f"kernels: {selected.explanation}")
    rounds, batch_sizes = (5, BATCH_SIZES[:2]) if arguments.quick else (15, BATCH_SIZES)
    figures = [each for size in batch_sizes for each in measure(selected.ops, size, rounds)]
    print(table(figures))
    if arguments.json:
        values = [asdict(each) for each in figures]
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
