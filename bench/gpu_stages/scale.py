"""How large everything is that the check measures: the sizes for a GPU, and tiny ones for a CPU."""

from dataclasses import dataclass

import torch

from pagewire.engine.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSizes:
    """Of the kernels' inputs."""

    num_rows: int  # of a decode step
    context_len: int  # of each
    chunk_len: int  # of a prompt
    num_tokens: int  # that norms and activations run
    few_tokens: int  # of a step whose matrices are in 4 bits
    sampled_rows: int  # of logits
    num_pages: int  # that are gathered and scattered


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSizes:
    """Of the mixture of experts in one layer."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The sizes for one kind of device."""

    device: str
    dtype: str
    model: ModelConfig
    mixture: MixtureSizes
    page_size: int
    timed: KernelSizes
    checked: KernelSizes  # small enough for float64 on the host
    copy_bytes: int
    gemm_size: int
    decode: tuple[tuple[int, int], ...]  # (rows, context) of each step that is timed
    few_decode: tuple[tuple[int, int], ...]  # the same of models in fewer bits
    prefill: tuple[int, ...]  # prompt lengths
    repeats: int
    num_handed_over: int  # tokens of the prompt that is handed over
    num_handovers: int  # between two processes; the first is to warm up
    num_slots: int  # staging slots of each
    num_parity_tokens: int
    num_parity_layers: int

    @property
    def title(self) -> str:
        if self.device == "cpu":
            return "cpu (tiny sizes)"
        return torch.cuda.get_device_name()

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def choose_scale() -> Scale:
    """That of the device which is there."""
    return FULL if torch.cuda.is_available() else TINY


def _llama(**sizes: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        mixture=None,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=None,
        qkv_bias=False,
        qk_norm=False,
        sliding_window=None,
        tie_word_embeddings=False,
        **sizes,
    )


FULL = Scale(
    device="cuda",
    dtype="bfloat16",
    # Llama-3-8B
    model=_llama(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_model_len=8704,
    ),
    # Qwen3-30B-A3B
    mixture=MixtureSizes(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768),
    page_size=64,
    timed=KernelSizes(
        num_rows=32,
        context_len=4096,
        chunk_len=8192,
        num_tokens=8192,
        few_tokens=16,
        sampled_rows=256,
        num_pages=128,
    ),
    checked=KernelSizes(
        num_rows=10,
        context_len=197,
        chunk_len=70,
        num_tokens=37,
        few_tokens=5,
        sampled_rows=4,
        num_pages=5,
    ),
    copy_bytes=4 << 30,
    gemm_size=8192,
    decode=((1, 1024), (1, 4096), (32, 1024), (32, 4096), (128, 1024), (256, 1024)),
    few_decode=((1, 1024), (32, 1024)),
    prefill=(1024, 4096, 8192),
    repeats=20,
    num_handed_over=4096,
    num_handovers=6,
    num_slots=32,
    num_parity_tokens=64,
    num_parity_layers=2,
)
_TINY_SIZES = KernelSizes(
    num_rows=2,
    context_len=17,
    chunk_len=18,
    num_tokens=3,
    few_tokens=2,
    sampled_rows=2,
    num_pages=2,
)
TINY = Scale(
    device="cpu",
    dtype="float16",  # which Triton's interpreter computes exactly, unlike bfloat16
    model=_llama(
        vocab_size=193,
        hidden_size=64,
        intermediate_size=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_model_len=64,
    ),
    mixture=MixtureSizes(num_experts=4, top_k=2, hidden_size=32, intermediate_size=16),
    page_size=16,
    timed=_TINY_SIZES,
    checked=_TINY_SIZES,
    copy_bytes=1 << 20,
    gemm_size=64,
    decode=((1, 16), (3, 20)),
    few_decode=((1, 16),),
    prefill=(20,),
    repeats=2,
    num_handed_over=18,
    num_handovers=2,
    num_slots=4,
    num_parity_tokens=2,
    num_parity_layers=1,
)
