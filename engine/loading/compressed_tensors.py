"""Matrices as the compressed-tensors library saves them: what llm-compressor makes for vLLM.

`pack-quantized` holds 4 bits, eight input features in a word, lowest bits first, as numbers around
8; the other formats hold int8 or float8_e4m3fn as they are. How activations and the KV cache are
quantised is the choice of `--quantization` and `--kv-cache-dtype`, so that part is not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.engine.config_fields import Fields
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Storage
from pagewire.engine.loading.nibbles import unpack_columns
from pagewire.engine.loading.stored_tensor import StoredTensor
from pagewire.engine.loading.weight_format import (
    FLOATS,
    read,
    read_group_size,
    storage_of_4_bits,
)
from pagewire.kernels.quantized_matrix import QuantizedMatrix, consecutive_groups

SUPPORTED = {  # (format, type, num_bits) to what it is, for people
    ("pack-quantized", "int", 4): "4 bits",
    ("int-quantized", "int", 8): "8 bits",
    ("naive-quantized", "int", 8): "8 bits",
    ("float-quantized", "float", 8): "fp8",
    ("naive-quantized", "float", 8): "fp8",
}
STRATEGIES = ("tensor", "channel", "group")

_ZERO_OF_4_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """How the weights of a checkpoint were quantised."""

    title: str
    group_size: int | None  # None: scales of a tensor or of each output
    ordered: bool  # groups may not be runs of input features

    @classmethod
    def of(cls, form: str, fields: Fields) -> "_Scheme":
        """From the weights of one of the config_groups. Raises ModelError."""
        kind = (form, fields.string("type", "int"), fields.integer("num_bits"))
        if kind not in SUPPORTED:
            names = ", ".join(f"{name} of {type_}{bits}" for name, type_, bits in SUPPORTED)
            raise ModelError(f"weights are {kind[0]} of {kind[1]}{kind[2]}; supported are {names}")
        strategy = fields.string("strategy", "tensor")
        if strategy not in STRATEGIES:
            raise ModelError(f"strategy is {strategy!r}; supported are {', '.join(STRATEGIES)}")
        return cls(
            title=f"compressed-tensors in {SUPPORTED[kind]}",
            group_size=read_group_size(fields) if strategy == "group" else None,
            ordered=fields.string("actorder", "") in ("group", "dynamic"),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedTensorsFormat:
    """Implements `pagewire.engine.loading.weight_format.WeightFormat`."""

    tensors: Mapping[str, StoredTensor]
    scheme: _Scheme

    @classmethod
    def of(cls, fields: Fields, tensors: Mapping[str, StoredTensor]) -> "CompressedTensorsFormat":
        """From the quantization_config of config.json. Raises ModelError."""
        for name in ("sparsity_config", "transform_config"):
            if fields.mapping(name):
                raise ModelError(f"{name} is {fields.mapping(name)}; none is supported")
        form = fields.string("format", "")
        groups = fields.mapping("config_groups")
        schemes = {
            _Scheme.of(form, Fields(Fields(group).mapping("weights"))) for group in groups.values()
        }
        if len(schemes) != 1:
            raise ModelError(
                f"config_groups quantise weights in {len(schemes)} ways; only one way for all "
                "matrices is supported"
            )
        return cls(tensors=tensors, scheme=schemes.pop())

    @property
    def title(self) -> str:
        return self.scheme.title

    def storage(self, module: str) -> Storage:
        if f"{module}.weight_packed" in self.tensors:
            ordered = self.scheme.ordered
            return Storage.QUANTIZED if ordered else storage_of_4_bits(self.scheme.group_size)
        return Storage.QUANTIZED if f"{module}.weight_scale" in self.tensors else Storage.FLOAT

    def matrix(self, module: str) -> QuantizedMatrix:
        packed = f"{module}.weight_packed" in self.tensors
        quants, zeros = self._packed(module) if packed else self._plain(module)
        out_features, in_features = quants.shape
        scales = read(self.tensors, f"{module}.weight_scale", *FLOATS)
        if scales.numel() == 1:  # of the tensor
            scales = scales.reshape(1, 1).expand(out_features, 1)
        return QuantizedMatrix(
            quants=quants,
            scales=scales,
            zeros=torch.full(scales.shape, _ZERO_OF_4_BITS) if packed and zeros is None else zeros,
            group_of=self._groups(module, in_features),
        )

    def _packed(self, module: str) -> tuple[Tensor, Tensor | None]:
        """Words run over the input features of weights, and over the outputs of zeros."""
        shape = read(self.tensors, f"{module}.weight_shape", "I64", "I32")
        out_features, in_features = shape.tolist()
        words = read(self.tensors, f"{module}.weight_packed", "I32")
        quants = unpack_columns(words)[:, :in_features]
        if f"{module}.weight_zero_point" not in self.tensors:
            return quants, None
        words = read(self.tensors, f"{module}.weight_zero_point", "I32")
        return quants, unpack_columns(words.T)[:, :out_features].T

    def _plain(self, module: str) -> tuple[Tensor, Tensor | None]:
        quants = read(self.tensors, f"{module}.weight", "I8", "F8_E4M3")
        if f"{module}.weight_zero_point" not in self.tensors:
            return quants, None
        return quants, read(self.tensors, f"{module}.weight_zero_point", "I8")

    def _groups(self, module: str, in_features: int) -> Tensor:
        if f"{module}.weight_g_idx" in self.tensors:
            return read(self.tensors, f"{module}.weight_g_idx", "I32", "I64").long()
        return consecutive_groups(in_features, self.scheme.group_size)
