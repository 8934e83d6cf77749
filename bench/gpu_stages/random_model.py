"""A model of random weights on a device, made there: what steps cost does not depend on them."""

import torch
from torch import Tensor

from gpu_stages.eager_recording import capture
from gpu_stages.scale import Scale
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.load import kv_layout
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.models.feed_forward import DenseFeedForward
from pagewire.engine.models.llama import LayerWeights, LlamaModel, LlamaWeights
from pagewire.engine.models.rope import inverse_frequencies
from pagewire.engine.parallel.tensor_parallel import NoFollowers
from pagewire.kernels.float_linear import choose_float_kernel, float_linear
from pagewire.kernels.ops import Linear, Ops
from pagewire.kernels.quantized_linears import quantize_weight
from pagewire.kernels.select import Kernels, select_ops
from pagewire.kernels.triton_ops import TritonOps, find_gpu
from pagewire.kernels.w8a8 import FP8


def random_model(
    scale: Scale, numbers: torch.dtype | None = None, *, deterministic: bool = False
) -> LlamaModel:
    """The model of `scale`, whose decode steps are recorded: on a CPU by the double of graphs.

    `numbers`: of its matrices, as `quantize_weight` takes them; None: the floats of the scale.
    """
    torch.manual_seed(0)
    config = scale.model
    selected = select_ops(
        Kernels.TRITON, scale.device, deterministic=deterministic, fp8=numbers is FP8
    )
    ops: Ops = selected.ops
    if scale.device == "cpu":
        ops = TritonOps(find_gpu("cpu"), capture, deterministic=deterministic)
    float_kernel = choose_float_kernel(selected, scale.torch_dtype, scale.device)

    def matrix(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns, dtype=scale.torch_dtype, device=scale.device)
        return weight.normal_(std=columns**-0.5)

    def in_floats(weight: Tensor, out_dtype: torch.dtype) -> Linear:
        return float_linear(
            weight, None, kernel=float_kernel, library=selected.library, out_dtype=out_dtype
        )

    def linear(rows: int, columns: int) -> Linear:
        weight = matrix(rows, columns)
        if numbers is None:
            return in_floats(weight, scale.torch_dtype)
        assert selected.quantized_linears is not None, "Triton has matrices in fewer bits"
        quantized = quantize_weight(weight, numbers)
        return selected.quantized_linears.linear([quantized], None, scale.torch_dtype)

    def norm() -> Tensor:
        return torch.ones(config.hidden_size, dtype=scale.torch_dtype, device=scale.device)

    hidden, ffn = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    layers = tuple(
        LayerWeights(
            input_norm=norm(),
            qkv=linear(qkv, hidden),
            q_norm=None,
            k_norm=None,
            output=linear(hidden, heads),
            post_attention_norm=norm(),
            feed_forward=DenseFeedForward(
                gate_up=linear(2 * ffn, hidden),
                down=linear(hidden, ffn),
                ops=ops,
            ),
        )
        for _ in range(config.num_layers)
    )
    weights = LlamaWeights(
        embedding=matrix(config.vocab_size, hidden),
        layers=layers,
        norm=norm(),
        lm_head=in_floats(matrix(config.vocab_size, hidden), torch.float32),
    )
    return LlamaModel(config, weights, inverse_frequencies(config).to(scale.device), ops)


def runner_of(
    model: LlamaModel, scale: Scale, num_pages: int, kv_dtype: str | None = None
) -> ModelRunner:
    """An engine with a pool of its own; `kv_dtype` None is that of the scale."""
    layout = kv_layout(model.config, page_size=scale.page_size, dtype=kv_dtype or scale.dtype)
    return ModelRunner(
        model,
        KVCache(layout, num_pages, scale.device),
        layout=layout,
        followers=NoFollowers(),
        max_model_len=model.config.max_model_len,
        digest=b"",
    )


def bytes_of_step(model: LlamaModel) -> int:
    """Of the weights that a step reads: all but the embedding."""
    return model.weight_bytes - model.embedding.nbytes
