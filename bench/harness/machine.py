"""What this machine could do at best: memory read bandwidth, GEMM rates, and the bounds from them.

Runs as a process of its own, `python -m harness.machine MODEL`, and prints JSON, so that the load
generator itself never loads torch. The bound of a step is the longer of reading all weights and KV
once and computing all products once; dispatch, norms and softmax are left out.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

READ_BYTES = 1 << 30
GEMM_SHAPE = (1024, 576, 3072)  # tokens, in, out: the widest layer of the default model
REPEATS = 9

# Bytes of one weight. int4 has a 16-bit scale and zero for every 32 weights.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}
# What the products of those weights can be computed in; the fastest of them is the limit, since a
# CPU without instructions for bfloat16 computes in float32.
COMPUTE = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "float32"),
    "int8": ("int8",),
    "int4": ("int8", "bfloat16", "float32"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a step reads and computes."""

    layer_weights: int  # of all layers
    head_weights: int  # of the LM head, which prefill runs for the last token only
    kv_values: int  # per token of context, all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Measured limits with all cores."""

    cores: int
    read_gb_per_s: float
    gemm_gflop_per_s: Mapping[str, float]  # by compute dtype
    model: ModelSize

    def decode_bound_ms(self, weights: str, *, batch: int, context: int) -> float:
        """The least time of a decode step, with 16-bit KV (32-bit beside float32 weights)."""
        count = self.model.layer_weights + self.model.head_weights
        kv_bytes = batch * context * self.model.kv_values * (4 if weights == "float32" else 2)
        read_s = (count * WEIGHT_BYTES[weights] + kv_bytes) / (self.read_gb_per_s * 1e9)
        compute_s = 2 * count * batch / self._products_per_s(weights)
        return max(read_s, compute_s) * 1e3

    def prefill_bound_tokens_per_s(self, weights: str) -> float:
        """The highest rate of prompt tokens: products of the layers alone, no attention."""
        return self._products_per_s(weights) / (2 * self.model.layer_weights)

    def _products_per_s(self, weights: str) -> float:
        """Operations, two of them a product."""
        return max(self.gemm_gflop_per_s[dtype] for dtype in COMPUTE[weights]) * 1e9


def from_json(text: str) -> Machine:
    """The machine that `python -m harness.machine` printed."""
    values = json.loads(text)
    return Machine(**values | {"model": ModelSize(**values["model"])})


def measure(path: Path) -> Machine:
    """Measure this machine; `path` is the model whose sizes the bounds are for."""
    import torch

    torch.manual_seed(0)
    return Machine(
        cores=torch.get_num_threads(),
        read_gb_per_s=_read_gb_per_s(),
        gemm_gflop_per_s=_gemm_rates(),
        model=_model_size(path),
    )


def _model_size(path: Path) -> ModelSize:
    from pagewire.engine.loading.weights import open_checkpoint

    config = open_checkpoint(path).config
    q_rows, kv_rows = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    attention = config.hidden_size * (2 * q_rows + 2 * kv_rows)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return ModelSize(
        layer_weights=config.num_layers * (attention + mlp),
        head_weights=config.vocab_size * config.hidden_size,
        kv_values=2 * config.num_layers * kv_rows,
    )


def _read_gb_per_s() -> float:
    import torch

    data = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / _best_s(data.sum) / 1e9


def _gemm_rates() -> dict[str, float]:
    import torch
    from torch import Tensor
    from torch.nn.functional import linear

    tokens, rows, columns = GEMM_SHAPE
    operations = 2 * tokens * rows * columns
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, rows, dtype=dtype)  # [tokens, rows]
        weight = torch.randn(columns, rows, dtype=dtype)  # [columns, rows]

        def run(x: Tensor = x, weight: Tensor = weight) -> object:
            return linear(x, weight)

        rates[str(dtype).removeprefix("torch.")] = operations / _best_s(run) / 1e9
    a = torch.randint(-127, 127, (tokens, rows), dtype=torch.int8)
    b = torch.randint(-127, 127, (rows, columns), dtype=torch.int8)
    rates["int8"] = operations / _best_s(lambda: torch._int_mm(a, b)) / 1e9
    return rates


def _best_s(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)  # a limit: whatever slowed the others down is not part of it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    print(json.dumps(asdict(measure(parser.parse_args().model))))
