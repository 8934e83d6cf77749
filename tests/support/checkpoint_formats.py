"""Every format in which matrices of a checkpoint may come quantised, with random numbers in it."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from packed_checkpoints import Numbers, Pack, awq, gptq, pack_quantized, random_numbers
from torch import Tensor

from pagewire.engine.loading.checkpoint import Storage

GROUP_SIZE = 128
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 2,
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "desc_act": False,
    "sym": True,
}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "zero_point": True,
    "version": "gemm",
}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    weights = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "quantization_status": "compressed",
    }


FP8_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [GROUP_SIZE, GROUP_SIZE],
}
W4 = {"num_bits": 4, "strategy": "group", "group_size": GROUP_SIZE}
W8 = {"num_bits": 8, "strategy": "channel"}


def packed_by(pack: Callable[[str, Numbers], dict[str, Tensor]], **options: Any) -> Pack:
    """Random numbers of 4 bits for each layer, packed by `pack`."""

    def run(name: str, shape: torch.Size) -> tuple[dict[str, Tensor], Tensor]:
        numbers = random_numbers(shape, **{"group_size": GROUP_SIZE, **options})
        return pack(name, numbers), numbers.weight()

    return run


def eight_bits(
    dtype: torch.dtype,
    *,
    per_tensor: bool = False,
    zeros: bool = False,
    group_size: int | None = None,
) -> Pack:
    """Random weights of int8 or fp8, as they are, with their scales."""

    def run(name: str, shape: torch.Size) -> tuple[dict[str, Tensor], Tensor]:
        out_features, in_features = shape
        groups = 1 if group_size is None else in_features // group_size
        generator = torch.Generator().manual_seed(in_features)
        values = torch.randint(-127, 128, shape, generator=generator).to(dtype)
        grouped = (1,) if per_tensor else (out_features, groups)
        scales = (torch.rand(grouped, generator=generator) * 1e-3 + 1e-4).bfloat16()
        tensors = {f"{name}.weight": values, f"{name}.weight_scale": scales}
        exact = values.double().view(out_features, groups, -1)
        if zeros:
            points = torch.randint(-20, 20, (out_features, 1), generator=generator)
            tensors[f"{name}.weight_zero_point"] = points.to(torch.int8)
            exact = exact - points[..., None]
        wide = scales.double().expand(out_features, groups)[..., None]
        return tensors, (exact * wide).view(out_features, in_features).float()

    return run


def fp8_in_blocks(name: str, shape: torch.Size) -> tuple[dict[str, Tensor], Tensor]:
    """Random weights with a float32 scale for each block, the last of fewer rows."""
    blocks = [-(-size // GROUP_SIZE) for size in shape]
    generator = torch.Generator().manual_seed(shape[0])
    values = torch.randint(-127, 128, shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(blocks, generator=generator) * 1e-3 + 1e-4
    weight = torch.empty(shape)
    for row, column in product(range(blocks[0]), range(blocks[1])):
        rows = slice(row * GROUP_SIZE, (row + 1) * GROUP_SIZE)
        columns = slice(column * GROUP_SIZE, (column + 1) * GROUP_SIZE)
        weight[rows, columns] = values[rows, columns].float() * scales[row, column]
    return {f"{name}.weight": values, f"{name}.weight_scale_inv": scales}, weight


CASES: dict[str, tuple[Pack, dict[str, Any], Storage]] = {
    "gptq symmetric": (packed_by(gptq, zero=8), GPTQ, Storage.INT4),
    "gptq asymmetric": (packed_by(gptq), {**GPTQ, "sym": False}, Storage.INT4),
    "gptq v2": (
        packed_by(lambda name, numbers: gptq(name, numbers, zero_offset=0)),
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        Storage.INT4,
    ),
    "gptq desc_act": (
        packed_by(gptq, permuted=True),
        {**GPTQ, "desc_act": True},
        Storage.QUANTIZED,
    ),
    "gptq groups of 16": (
        packed_by(gptq, group_size=16),
        {**GPTQ, "group_size": 16},
        Storage.QUANTIZED,
    ),
    "awq": (packed_by(awq), AWQ, Storage.INT4),
    "w4a16 symmetric": (
        packed_by(
            lambda name, numbers: pack_quantized(name, numbers, symmetric=True),
            zero=8,
            scale_dtype=torch.bfloat16,
        ),
        compressed("pack-quantized", **W4),
        Storage.INT4,
    ),
    "w4a16 asymmetric": (
        packed_by(lambda name, numbers: pack_quantized(name, numbers, symmetric=False)),
        compressed("pack-quantized", **W4, symmetric=False),
        Storage.INT4,
    ),
    "w8a8": (eight_bits(torch.int8), compressed("int-quantized", **W8), Storage.QUANTIZED),
    "w8a8 asymmetric": (
        eight_bits(torch.int8, zeros=True),
        compressed("int-quantized", **W8, symmetric=False),
        Storage.QUANTIZED,
    ),
    "w8 in groups": (
        eight_bits(torch.int8, group_size=GROUP_SIZE),
        compressed("naive-quantized", num_bits=8, strategy="group", group_size=GROUP_SIZE),
        Storage.QUANTIZED,
    ),
    "fp8 per channel": (
        eight_bits(torch.float8_e4m3fn),
        compressed("float-quantized", **{**W8, "type": "float"}),
        Storage.QUANTIZED,
    ),
    "fp8 in blocks": (fp8_in_blocks, FP8_BLOCKS, Storage.QUANTIZED),
    "fp8 per tensor": (
        eight_bits(torch.float8_e4m3fn, per_tensor=True),
        compressed("float-quantized", type="float", num_bits=8, strategy="tensor"),
        Storage.QUANTIZED,
    ),
}
