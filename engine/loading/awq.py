"""Matrices of 4 bits as AWQ's tools save them (Lin et al., 2023), in the order of its GEMM kernel.

qweight and qzeros pack eight outputs of one input feature, or group, in a word: first the even
ones, then the odd ones, the lowest bits first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AWQFormat:
    """Implements `pagewire.engine.loading.weight_format.WeightFormat`."""

    title: ClassVar[str] = "AWQ in 4 bits"

    tensors: Mapping[str, StoredTensor]
    group_size: int | None  # None: one group

    @classmethod
    def of(cls, fields: Fields, tensors: Mapping[str, StoredTensor]) -> "AWQFormat":
        """From the quantization_config of config.json. Raises ModelError."""
        bits = fields.integer("bits")
        if bits != 4:
            raise ModelError(f"bits is {bits}; of AWQ only 4 bits are supported")
        version = fields.string("version", "gemm").lower()
        if version != "gemm":
            raise ModelError(f"version is {version!r}; of AWQ only 'gemm' is supported")
        if not fields.flag("zero_point", True):
            raise ModelError("zero_point is False; of AWQ only weights with zeros are supported")
        return cls(tensors=tensors, group_size=read_group_size(fields))

    def storage(self, module: str) -> Storage:
        if f"{module}.qweight" not in self.tensors:
            return Storage.FLOAT
        return storage_of_4_bits(self.group_size)

    def matrix(self, module: str) -> QuantizedMatrix:
        weights = unpack_columns(read(self.tensors, f"{module}.qweight", "I32"), _ORDER)
        zeros = unpack_columns(read(self.tensors, f"{module}.qzeros", "I32"), _ORDER)
        return QuantizedMatrix(
            quants=weights.T.contiguous(),
            scales=read(self.tensors, f"{module}.scales", *FLOATS).T.contiguous(),
            zeros=zeros.T.contiguous(),
            group_of=consecutive_groups(len(weights), self.group_size),
        )
