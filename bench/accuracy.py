"""What quantisation costs: next-token distributions with matrices or a KV cache of fewer bits
against float32's and bfloat16's.

Runs the default model over windows of this repository's own documentation. KL divergence is that
of Kullback and Leibler, in nats, from the dtype that is named to the quantised model at each
position; top-1 agreement is the share of positions where both find the same token most likely. What
is quantised runs in float32 otherwise. What is a GPU's is emulated in plain torch, with the numbers
of its kernels (tests compare the two) and not their speed.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import kv_layout
from pagewire.engine.loading.quantized_matrices import NUMBERS
from pagewire.engine.loading.resolve import resolve_model
from pagewire.engine.loading.weights import load_model, open_checkpoint
from pagewire.engine.quantization import Quantization
from pagewire.kernels.emulated_linear import EmulatedLinears
from pagewire.kernels.ops import AttentionBatch
from pagewire.kernels.select import Kernels, SelectedOps, select_ops
from pagewire.router.tokenizer_loading import load_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
WINDOW = 500  # tokens; each starts without a context
PAGE_SIZE = 64
NUM_PAGES = -(-WINDOW // PAGE_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is quantised, and what runs it."""

    name: str
    dtype: str = "float32"
    quantization: Quantization = Quantization.NONE
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.AUTO
    gpu: bool = False  # as a GPU computes it

    def select(self) -> SelectedOps:
        if not self.gpu:
            return select_ops(Kernels.AUTO, "cpu")
        linears = EmulatedLinears(dtypes=tuple(NUMBERS.values()))
        return replace(select_ops(Kernels.TORCH, "cpu"), quantized_linears=linears)


FLOAT32 = Variant(name="float32")
BFLOAT16 = Variant(name="bfloat16", dtype="bfloat16")
VARIANTS = (
    Variant(name="int8", quantization=Quantization.INT8),
    Variant(name="int4", quantization=Quantization.INT4),
    Variant(name="int8 on a GPU", quantization=Quantization.INT8, gpu=True),
    Variant(name="fp8 on a GPU", quantization=Quantization.FP8, gpu=True),
    Variant(name="w4a16 on a GPU", quantization=Quantization.W4A16, gpu=True),
    Variant(name="int8 KV cache", kv_cache_dtype=KVCacheDtype.INT8),
    Variant(name="fp8 KV cache on a GPU", kv_cache_dtype=KVCacheDtype.FP8, gpu=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """One variant against a dtype."""

    variant: str
    reference: str
    num_tokens: int
    kl_mean: float  # nats
    kl_p99: float
    top1_agreement: float


def load_windows(path: Path, num_windows: int) -> Tensor:
    """Token ids of the documentation, int64 [num_windows, WINDOW]."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    token_ids = load_tokenizer(path).encode(text)[: num_windows * WINDOW]
    return torch.tensor(token_ids).view(num_windows, WINDOW)


def log_probabilities(path: Path, variant: Variant, windows: Tensor) -> Tensor:
    """float32 [num_windows * WINDOW, vocab_size], at every position of each window."""
    checkpoint = open_checkpoint(path)
    model = load_model(
        checkpoint,
        dtype=getattr(torch, variant.dtype),
        device="cpu",
        selected=variant.select(),
        quantization=variant.quantization,
    )
    dtype = variant.kv_cache_dtype.resolve(variant.dtype)
    layout = kv_layout(checkpoint.config, page_size=PAGE_SIZE, dtype=dtype)
    pool = KVCache(layout, NUM_PAGES).pages
    positions = torch.arange(WINDOW)
    batch = AttentionBatch(
        cu_seqlens=torch.tensor([0, WINDOW], dtype=torch.int32),
        context_lens=torch.tensor([WINDOW], dtype=torch.int32),
        page_table=torch.arange(NUM_PAGES, dtype=torch.int32)[None],
        positions=positions,
        slots=positions,
        page_size=PAGE_SIZE,
    )
    with torch.inference_mode():
        logits = [model.forward(window, batch, pool, positions) for window in windows]
        return torch.cat(logits).log_softmax(dim=-1)


def compare(variant: Variant, reference: Variant, expected: Tensor, found: Tensor) -> Accuracy:
    """expected, found: log probabilities [num_tokens, vocab_size]; expected: of the reference."""
    divergence = (expected.exp() * (expected - found)).sum(dim=-1)
    agreement = expected.argmax(dim=-1) == found.argmax(dim=-1)
    return Accuracy(
        variant=variant.name,
        reference=reference.name,
        num_tokens=len(expected),
        kl_mean=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        top1_agreement=float(agreement.float().mean()),
    )


def measure(num_windows: int) -> list[Accuracy]:
    path = resolve_model(None)
    windows = load_windows(path, num_windows)

    def run(variant: Variant) -> Tensor:
        return log_probabilities(path, variant, windows)

    float32, bfloat16 = run(FLOAT32), run(BFLOAT16)
    results = [compare(BFLOAT16, FLOAT32, float32, bfloat16)]
    for variant in VARIANTS:
        found = run(variant)
        results.append(compare(variant, FLOAT32, float32, found))
        results.append(compare(variant, BFLOAT16, bfloat16, found))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="500 tokens instead of 2,000")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    results = measure(num_windows=1 if arguments.quick else 4)
    for result in results:
        print(
            f"{result.variant} against {result.reference}: KL divergence "
            f"{result.kl_mean:.4f} nats (p99 "
            f"{result.kl_p99:.3f}), top-1 agreement {result.top1_agreement:.1%} "
            f"on {result.num_tokens} tokens"
        )
    if arguments.json:
        values = [asdict(result) for result in results]
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
