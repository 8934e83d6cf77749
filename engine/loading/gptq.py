"""Matrices of 4 bits as GPTQ's tools save them (Frantar et al., 2022).

qweight packs eight input features of one output in a word, qzeros eight outputs of one group; both
with the lowest bits first. g_idx says the group of each input feature, so features that were
ordered by activation (desc_act) need nothing else. The first form of the format holds each zero
minus one, modulo 16; `gptq_v2` holds it as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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

FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GPTQFormat:
    """Implements `pagewire.engine.loading.weight_format.WeightFormat`."""

    title: ClassVar[str] = "GPTQ in 4 bits"

    tensors: Mapping[str, StoredTensor]
    group_size: int | None  # None: one group
    zero_offset: int  # what is added to a stored zero
    ordered: bool  # groups may not be runs of input features

    @classmethod
    def of(cls, fields: Fields, tensors: Mapping[str, StoredTensor]) -> "GPTQFormat":
        """From the quantization_config of config.json. Raises ModelError."""
        bits = fields.integer("bits")
        if bits != 4:
            raise ModelError(f"bits is {bits}; of GPTQ only 4 bits are supported")
        form = fields.string("checkpoint_format", "gptq")
        if form not in FORMATS:
            raise ModelError(
                f"checkpoint_format is {form!r}; supported are {', '.join(FORMATS)}: choose the "
                "checkpoint that it was made from"
            )
        return cls(
            tensors=tensors,
            group_size=read_group_size(fields),
            zero_offset=1 if form == "gptq" else 0,
            ordered=fields.flag("desc_act", False),
        )

    def storage(self, module: str) -> Storage:
        if f"{module}.qweight" not in self.tensors:
            return Storage.FLOAT
        return Storage.QUANTIZED if self.ordered else storage_of_4_bits(self.group_size)

    def matrix(self, module: str) -> QuantizedMatrix:
        words = read(self.tensors, f"{module}.qweight", "I32")  # [in_features / 8, out_features]
        quants = unpack_columns(words.T.contiguous())
        zeros = unpack_columns(read(self.tensors, f"{module}.qzeros", "I32"))  # [groups, outputs]
        return QuantizedMatrix(
            quants=quants,
            scales=read(self.tensors, f"{module}.scales", *FLOATS).T.contiguous(),
            zeros=((zeros + self.zero_offset) & 15).T.contiguous(),
            group_of=self._groups(module, quants.shape[1]),
        )

    def _groups(self, module: str, in_features: int) -> Tensor:
        if f"{module}.g_idx" in self.tensors:
            return read(self.tensors, f"{module}.g_idx", "I32", "I64").long()
        return consecutive_groups(in_features, self.group_size)
