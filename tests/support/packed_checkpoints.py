"""Tiny checkpoints whose matrices are packed as quantisation tools do, written from the formats.

Sources: GPTQ and AWQ as AutoGPTQ's and AutoAWQ's linear layers pack them; pack_to_int32 of the
compressed-tensors library. Words are put together number by number, so that nothing is shared with
the code that takes them apart.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs that the eight numbers of a word are, in turn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Numbers:
    """A matrix of unsigned numbers of 4 bits: weight = (number - zero) * scale of its group."""

    numbers: Tensor  # int64 [out_features, in_features], 0 to 15
    scales: Tensor  # [out_features, num_groups]
    zeros: Tensor  # int64 [out_features, num_groups], 0 to 15
    group_of: Tensor  # int64 [in_features]

    def weight(self) -> Tensor:
        """float32, exact."""
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of]
        return ((self.numbers - zeros).double() * scales.double()).float()


# From a module's name and the shape of its matrix: tensors of the file, and their weights.
Pack = Callable[[str, torch.Size], tuple[dict[str, Tensor], Tensor]]


def random_numbers(
    shape: torch.Size,
    *,
    group_size: int,
    zero: int | None = None,
    permuted: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Numbers:
    """Numbers for a matrix; its weights are about as large as a trained model's.

    `zero`: of all groups, as in symmetric quantisation; None: any. `permuted`: features belong to
    groups in no order, as with desc_act.
    """
    out_features, in_features = shape
    groups = in_features // group_size
    generator = torch.Generator().manual_seed(out_features * 7 + in_features)
    zeros = torch.randint(0, 16, (out_features, groups), generator=generator)
    scales = (torch.rand(out_features, groups, generator=generator) + 0.5) * 0.02
    group_of = torch.arange(in_features) // group_size
    if permuted:
        group_of = group_of[torch.randperm(in_features, generator=generator)]
    return Numbers(
        numbers=torch.randint(0, 16, (out_features, in_features), generator=generator),
        scales=scales.to(scale_dtype),
        zeros=zeros if zero is None else torch.full_like(zeros, zero),
        group_of=group_of,
    )


def words(eights: Tensor) -> Tensor:
    """int32 [...] from [..., 8] numbers of 4 bits, the first in the lowest bits."""
    packed = np.zeros(eights.shape[:-1], dtype=np.uint32)
    for index in range(8):
        packed |= eights[..., index].numpy().astype(np.uint32) << np.uint32(4 * index)
    return torch.from_numpy(packed.view(np.int32))


def words_of_rows(numbers: Tensor) -> Tensor:
    """int32 [rows, columns / 8] from [rows, columns]."""
    return words(numbers.reshape(len(numbers), -1, 8))


def gptq(name: str, numbers: Numbers, *, zero_offset: int = 1) -> dict[str, Tensor]:
    """qweight runs over the input features, qzeros over the outputs and holds zero - 1."""
    return {
        f"{name}.qweight": words_of_rows(numbers.numbers).T.contiguous(),
        f"{name}.qzeros": words_of_rows((numbers.zeros.T - zero_offset) % 16),
        f"{name}.scales": numbers.scales.T.contiguous(),
        f"{name}.g_idx": numbers.group_of.to(torch.int32),
    }


def awq(name: str, numbers: Numbers) -> dict[str, Tensor]:
    """qweight and qzeros run over the outputs, in the order of AWQ's GEMM kernel."""

    def packed(by_output: Tensor) -> Tensor:
        return words(by_output.reshape(len(by_output), -1, 8)[..., list(AWQ_ORDER)])

    return {
        f"{name}.qweight": packed(numbers.numbers.T),
        f"{name}.qzeros": packed(numbers.zeros.T),
        f"{name}.scales": numbers.scales.T.contiguous(),
    }


def pack_quantized(name: str, numbers: Numbers, *, symmetric: bool) -> dict[str, Tensor]:
    """weight_packed runs over the input features, weight_zero_point over the outputs."""
    tensors = {
        f"{name}.weight_packed": words_of_rows(numbers.numbers),
        f"{name}.weight_scale": numbers.scales,
        f"{name}.weight_shape": torch.tensor(numbers.numbers.shape),
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = words_of_rows(numbers.zeros.T).T.contiguous()
    return tensors


def write_packed(
    source: Path, directory: Path, pack: Pack, quantization_config: dict[str, Any]
) -> None:
    """Save the model of `source` to `directory`, with the matrices of its layers packed.

    Afterwards `source` has the weights that these stand for. Routers of mixtures, the embedding and
    the LM head stay as they are.
    """
    plain = load_file(source / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, weight in plain.items():
        if ".layers." not in name or weight.ndim != 2 or name.endswith("gate.weight"):
            packed[name] = weight
            continue
        tensors, plain[name] = pack(name.removesuffix(".weight"), weight.shape)
        packed.update(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(plain, source / "model.safetensors")
    save_file(packed, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": quantization_config})
    (directory / "config.json").write_text(text)
