"""How fast one thread multiplies matrices in floating point: every kernel beside `F.linear`.

On the shapes of the default model, against float32. A figure is a median of interleaved rounds and
of processor time, so that what else runs on the machine matters little; a call takes another
matrix than the one before it, as in a model.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness.table import markdown_table, number
from pagewire.kernels.float_linear import FloatKernel, float_linear
from pagewire.kernels.native_library import NativeLibrary, find_library
from pagewire.kernels.ops import Linear

SHAPES = {  # out_features, in_features
    "qkv": (960, 576),
    "output": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "lm_head": (49152, 576),
}
NUM_LAYERS = 30  # the LM head is there once
ROUND_PRODUCTS = 1 << 30  # multiplications of a round, which is one call at least

BASELINE = "F.linear float32"
KERNELS = {
    BASELINE: (FloatKernel.TORCH, torch.float32),
    "C++ float32": (FloatKernel.NATIVE, torch.float32),
    "C++ bfloat16": (FloatKernel.NATIVE, torch.bfloat16),
    "oneDNN float32": (FloatKernel.ONEDNN, torch.float32),
    "oneDNN bfloat16": (FloatKernel.ONEDNN, torch.bfloat16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one call takes."""

    shape: str
    num_tokens: int
    seconds: Mapping[str, float]  # by kernel

    def row(self) -> list[str]:
        base = self.seconds[BASELINE]
        ratios = [number(self.seconds[name] / base, 2) for name in KERNELS if name != BASELINE]
        return [self.shape, str(self.num_tokens), number(base * 1e6, 0), *ratios]


def measure(num_tokens: list[int], *, num_rounds: int) -> Iterator[Measurement]:
    """Every shape with every number of tokens."""
    library = find_library()
    for shape in SHAPES:
        matrices = {name: _matrices(name, shape, library) for name in KERNELS}
        for count in num_tokens:
            yield _measure(shape, count, matrices, num_rounds)


def _matrices(name: str, shape: str, library: NativeLibrary) -> list[Linear]:
    kernel, dtype = KERNELS[name]
    return [
        float_linear(
            torch.randn(SHAPES[shape]).to(dtype),
            None,
            kernel=kernel,
            library=library,
            out_dtype=dtype,
        )
        for _ in range(1 if shape == "lm_head" else NUM_LAYERS)
    ]


def _measure(
    shape: str, num_tokens: int, matrices: Mapping[str, list[Linear]], num_rounds: int
) -> Measurement:
    out_features, in_features = SHAPES[shape]
    calls = max(1, ROUND_PRODUCTS // (num_tokens * out_features * in_features))
    times: dict[str, list[float]] = {name: [] for name in matrices}
    for _ in range(num_rounds):
        for name, layers in matrices.items():
            x = torch.randn(num_tokens, in_features).to(KERNELS[name][1])
            start = time.thread_time()
            for call in range(calls):
                layers[call % len(layers)](x)
            times[name].append((time.thread_time() - start) / calls)
    return Measurement(
        shape=shape,
        num_tokens=num_tokens,
        seconds={name: statistics.median(values) for name, values in times.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes, num_rounds = ([1, 32], 3) if arguments.quick else ([1, 8, 32, 128, 512], 7)
    results = list(measure(sizes, num_rounds=num_rounds))
    header = [
        "matrix",
        "tokens",
        f"{BASELINE} µs",
        *(f"{name}, ratio" for name in list(KERNELS)[1:]),
    ]
    print(markdown_table(header, [result.row() for result in results]))
    if arguments.json:
        values = [asdict(result) for result in results]
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
