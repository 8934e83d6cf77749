"""One set of names for the tensors of a model, whichever a checkpoint has.

Ours are those of Llama, and for a mixture of experts those of Qwen3-MoE: mlp.gate, and
mlp.experts.0.gate_proj, up_proj and down_proj. Mixtral's files say block_sparse_moe and w1, w3, w2;
Phi-3 has q, k and v below one another in one tensor, and gate and up in another; transformers 5 can
save a matrix of all experts as one tensor of three dimensions.
"""

import re
from collections.abc import Iterator, Mapping

from pagewire.engine.config import ModelConfig
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.stored_tensor import StoredTensor, TensorPart

_MIXTRAL = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ALL_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_FUSED = re.compile(r"(.*\.layers\.\d+\.(?:self_attn|mlp))\.(qkv_proj|gate_up_proj)\.weight")


def with_our_names(
    tensors: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, with one that holds several matrices as its parts.

    Raises ModelError when such a tensor has other sizes than `config`.
    """
    rows = _rows_of_parts(config)
    return dict(each for name, tensor in tensors.items() for each in _renamed(name, tensor, rows))


def _rows_of_parts(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Of each tensor that holds several matrices: their names and rows."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size),
    }


def _renamed(
    name: str, tensor: StoredTensor, rows: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, StoredTensor]]:
    if match := _ALL_EXPERTS.fullmatch(name):
        yield from _of_all_experts(tensor, *match.groups())
    elif match := _FUSED.fullmatch(name):
        module, kind = match.groups()
        if tensor.shape[0] != sum(rows[kind].values()):
            raise ModelError(
                f"tensor {name} has {tensor.shape[0]} rows, but config.json asks for "
                f"{sum(rows[kind].values())}"
            )
        for part, where in _below_one_another(rows[kind]):
            yield f"{module}.{part}.weight", tensor.matrix(where)
    else:
        yield _from_mixtral(name), tensor


def _of_all_experts(
    tensor: StoredTensor, module: str, kind: str
) -> Iterator[tuple[str, StoredTensor]]:
    """The matrices in a tensor [num_experts, rows, columns]."""
    num_experts, num_rows, _ = tensor.shape
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    for expert in range(num_experts):
        for part, where in _below_one_another(
            dict.fromkeys(names, num_rows // len(names)), expert=expert
        ):
            yield f"{module}.{expert}.{part}.weight", tensor.matrix(where)


def _below_one_another(
    rows: Mapping[str, int], expert: int | None = None
) -> Iterator[tuple[str, TensorPart]]:
    start = 0
    for name, count in rows.items():
        yield name, TensorPart(start=start, end=start + count, expert=expert)
        start += count


def _from_mixtral(name: str) -> str:
    name = _MIXTRAL.sub(lambda match: f".mlp.experts.{match[1]}.{_MIXTRAL_PARTS[match[2]]}.", name)
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")
