"""Matrices in fp8 with a scale for each block, as DeepSeek-V3 and Qwen3 publish them.

Weights are float8_e4m3fn; weight_scale_inv has what they are multiplied with, for blocks of usually
128 by 128 (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pagewire.engine.config_fields import Fields
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Storage
from pagewire.engine.loading.stored_tensor import StoredTensor
from pagewire.engine.loading.weight_format import FLOATS, read
from pagewire.kernels.quantized_matrix import QuantizedMatrix, consecutive_groups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockFP8Format:
    """Implements `pagewire.engine.loading.weight_format.WeightFormat`."""

    title: ClassVar[str] = "fp8 in blocks"

    tensors: Mapping[str, StoredTensor]
    rows: int  # of a block
    columns: int

    @classmethod
    def of(cls, fields: Fields, tensors: Mapping[str, StoredTensor]) -> "BlockFP8Format":
        """From the quantization_config of config.json. Raises ModelError."""
        numbers = fields.string("fmt", "e4m3")
        if numbers != "e4m3":
            raise ModelError(f"fmt is {numbers!r}; only 'e4m3' is supported")
        block = fields.integers("weight_block_size")
        if len(block) != 2 or min(block) < 1:
            raise ModelError(
                f"weight_block_size is {list(block)}; only blocks of rows and columns are supported"
            )
        return cls(tensors=tensors, rows=block[0], columns=block[1])

    def storage(self, module: str) -> Storage:
        quantized = f"{module}.weight_scale_inv" in self.tensors
        return Storage.QUANTIZED if quantized else Storage.FLOAT

    def matrix(self, module: str) -> QuantizedMatrix:
        quants = read(self.tensors, f"{module}.weight", "F8_E4M3")
        out_features, in_features = quants.shape
        scales = read(self.tensors, f"{module}.weight_scale_inv", *FLOATS)  # of blocks
        return QuantizedMatrix(
            quants=quants,
            scales=scales.repeat_interleave(self.rows, dim=0)[:out_features],
            zeros=None,
            group_of=consecutive_groups(in_features, self.columns),
        )
