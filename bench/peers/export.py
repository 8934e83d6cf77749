"""Writes the default model as the safetensors directory that other engines take.

Weights come through Pagewire's own GGUF reader, in bfloat16; the tokenizer through transformers.
Every peer that cannot read GGUF so runs the very same model.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from pagewire.engine.config import ModelConfig
from pagewire.engine.loading.checkpoint import Checkpoint
from pagewire.engine.loading.resolve import resolve_model
from pagewire.engine.loading.weights import open_checkpoint

DTYPE = torch.bfloat16


class ExportError(Exception):
    """A model that this tool cannot write."""


def export(gguf: Path, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files to a new directory.

    Raises ExportError for another architecture than Llama, and ModelError for a damaged file.
    """
    checkpoint = open_checkpoint(gguf)
    config = checkpoint.config
    if config.architecture != "llama" or config.rope_scaling is not None:
        raise ExportError(
            f"{gguf.name} is a {config.architecture} model or has scaled rope; "
            "only Llama models with plain rope can be exported"
        )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    directory.mkdir(parents=True)
    save_file(read_tensors(checkpoint), directory / "model.safetensors", {"format": "pt"})
    values = hugging_face_config(config)
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(directory)


def hugging_face_config(config: ModelConfig) -> dict[str, object]:
    """The config.json of a Llama model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_model_len,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def read_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a Llama checkpoint, by their Hugging Face names."""
    tensors = {}
    for name, shape in tensor_shapes(checkpoint.config).items():
        tensors[name] = torch.empty(shape, dtype=DTYPE)
        checkpoint.read(name, tensors[name])
    return tensors


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama model: rows are outputs, columns inputs."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": rows for name, rows in layer.items()}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--model", help="a GGUF file; none: the default model")
    arguments = parser.parse_args()
    export(resolve_model(arguments.model), arguments.directory)


if __name__ == "__main__":
    main()
