"""A model in one GGUF file.

Tensors are read under their Hugging Face names. The file is mapped, and few rows of a tensor take
memory while they are converted.
"""

import math
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pagewire.engine import config
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Part, Storage
from pagewire.engine.loading.dequantize import dequantize, int4_blocks, storage_of
from pagewire.engine.loading.gguf_header import GGUFHeader, TensorEntry, read_header
from pagewire.kernels.int4_linear import Int4Blocks
from pagewire.kernels.ops import GROUP
from pagewire.kernels.quantized_matrix import QuantizedMatrix

_CHUNK = 1 << 17  # weights converted at a time, so that what lies in between stays in the cache
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)\.(weight|bias)")
_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GGUFCheckpoint:
    """Implements `pagewire.engine.loading.checkpoint.Checkpoint`.

    Raises ModelError when the file is damaged or the model is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        data = _map(path)
        try:
            header = read_header(memoryview(data))
            self.config = _config(header)
        except ModelError as error:
            raise ModelError(f"model file {path.name}: {error}") from error
        self._tensors = header.tensors
        self._bytes = torch.frombuffer(data, dtype=torch.uint8)

    @property
    def quantized_as(self) -> str | None:
        return None

    def read(self, name: str, into: Tensor, part: Part | None = None) -> None:
        name = _gguf_name(name)
        entry = self._entry(name)
        shape = part.whole_shape(into.shape) if part else tuple(into.shape)
        if entry.shape != shape:
            raise ModelError(
                f"model file {self._name}: tensor {name} has shape {list(entry.shape)}, "
                f"but its metadata asks for {list(shape)}"
            )
        if part and part.dim == 0:
            entry, part = _rows(entry, part.index), None
        for rows in _chunks(entry.shape, self.config.head_dim):
            values = self._in_our_order(name, self._dequantize(name, _rows(entry, rows)))
            into[rows.start : rows.stop].copy_(part.of(values) if part else values)

    def storage(self, name: str) -> Storage:
        return storage_of(self._entry(_gguf_name(name)))

    def read_int4(self, name: str, part: Part | None = None) -> Int4Blocks:
        name = _gguf_name(name)
        entry = self._entry(name)
        if storage_of(entry) is not Storage.INT4:
            raise ModelError(f"model file {self._name}: tensor {name} has no 4-bit blocks")
        if part and part.dim == 0:
            entry = _rows(entry, part.index)
        blocks = int4_blocks(self._raw(entry), entry)
        columns = part.index if part and part.dim == 1 else range(entry.shape[1])
        groups = slice(columns.start // GROUP, columns.stop // GROUP)
        return Int4Blocks(
            quants=self._in_our_order(name, blocks.quants)[:, groups],
            scales=self._in_our_order(name, blocks.scales)[:, groups],
            minima=self._in_our_order(name, blocks.minima)[:, groups],
        )

    def read_quantized(self, name: str, part: Part | None = None) -> QuantizedMatrix | None:
        self._entry(_gguf_name(name))
        return None

    def rope_factors(self) -> Tensor | None:
        entry = self._tensors.get("rope_freqs.weight")
        if entry is None:
            return None
        factors = self._dequantize("rope_freqs.weight", entry).float()
        if factors.shape != (self.config.head_dim // 2,):
            raise ModelError(
                f"model file {self._name}: tensor rope_freqs.weight has shape "
                f"{list(factors.shape)}, but its metadata asks for [{self.config.head_dim // 2}]"
            )
        return factors

    def _entry(self, name: str) -> TensorEntry:
        entry = self._tensors.get(name)
        if entry is None:
            raise ModelError(f"model file {self._name} has no tensor {name}")
        return entry

    def _raw(self, entry: TensorEntry) -> Tensor:
        return self._bytes[entry.start : entry.start + entry.num_bytes]

    def _in_our_order(self, name: str, rows: Tensor) -> Tensor:
        """`rows` of a tensor, [out_features, ...], as Hugging Face has them."""
        paired = name.endswith(("attn_q.weight", "attn_k.weight"))
        if self.config.architecture == "llama" and paired:
            return _halves_from_pairs(rows, self.config.head_dim)
        return rows

    def _dequantize(self, name: str, entry: TensorEntry) -> Tensor:
        try:
            return dequantize(self._raw(entry), entry)
        except ModelError as error:
            raise ModelError(f"model file {self._name}: tensor {name} {error}") from error


def _map(path: Path) -> mmap.mmap:
    """Copy-on-write, never written: torch has no read-only tensors and warns about such memory."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise ModelError(f"model file {path.name} cannot be read: {error}") from error


def _config(header: GGUFHeader) -> config.ModelConfig:
    if header.metadata.get("split.count", 1) > 1:
        raise ModelError("it is one part of several; merge them with llama-gguf-split first")
    embedding = header.tensors.get("token_embd.weight")
    return config.from_gguf(
        header.metadata,
        vocab_size=embedding.shape[0] if embedding else 0,
        tied="output.weight" not in header.tensors,
    )


def _gguf_name(name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return _NAMES[name]
    layer, part, kind = match.groups()
    return f"blk.{layer}.{_LAYER_PARTS[part]}.{kind}"


def _chunks(shape: Sequence[int], head_dim: int) -> Iterator[range]:
    """The rows of a tensor a few at a time, in whole heads."""
    heads = max(1, _CHUNK // (math.prod(shape[1:]) * head_dim))
    starts = range(0, shape[0], heads * head_dim)
    return (range(start, min(start + starts.step, shape[0])) for start in starts)


def _rows(entry: TensorEntry, index: range) -> TensorEntry:
    """Some rows of a tensor: they are neighbours in the file, too."""
    row_bytes = entry.num_bytes // entry.shape[0]
    return replace(
        entry,
        shape=(len(index), *entry.shape[1:]),
        start=entry.start + index.start * row_bytes,
        num_bytes=len(index) * row_bytes,
    )


def _halves_from_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Undo the row order of llama's q and k, which GGUF has for rope on neighbouring pairs."""
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
