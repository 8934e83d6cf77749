"""One set of names for the tensors of experts, whichever a checkpoint has.

Ours are those of Qwen3-MoE: mlp.gate, and mlp.experts.0.gate_proj, up_proj and down_proj. Mixtral's
files say block_sparse_moe and w1, w3, w2, and transformers 5 can save the matrices of all experts
of a layer as one tensor, gate and up below one another.
"""

import re
from collections.abc import Iterator, Mapping

from pagewire.engine.loading.stored_tensor import ExpertPart, StoredTensor

_MIXTRAL = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def with_our_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, where those of several experts are one tensor as its parts."""
    return dict(renamed for name, tensor in tensors.items() for renamed in _renamed(name, tensor))


def _renamed(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    fused = _FUSED.fullmatch(name)
    if fused is None or len(tensor.shape) != 3:
        yield _from_mixtral(name), tensor
        return
    experts, kind = fused.groups()
    num_experts, rows, _ = tensor.shape
    parts = _FUSED_PARTS[kind]
    size = rows // len(parts)
    for expert in range(num_experts):
        for index, part in enumerate(parts):
            where = ExpertPart(expert=expert, start=index * size, end=(index + 1) * size)
            yield (
                f"{experts}.{expert}.{part}.weight",
                StoredTensor(file=tensor.file, name=tensor.name, part=where),
            )


def _from_mixtral(name: str) -> str:
    name = _MIXTRAL.sub(lambda match: f".mlp.experts.{match[1]}.{_MIXTRAL_PARTS[match[2]]}.", name)
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")
