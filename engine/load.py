"""From a model's path to an engine that can run steps: what a worker does once, at its start."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from pagewire.engine.config import ModelConfig
from pagewire.engine.emulation import no_kernels, require_cpu_kernels
from pagewire.engine.errors import KernelError, ModelError
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.loading.identity import model_digest
from pagewire.engine.loading.weights import load_model, open_checkpoint
from pagewire.engine.memory import available_bytes, choose_num_pages, default_share
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.tensor_parallel import TensorParallel
from pagewire.engine.precision import default_dtype
from pagewire.engine.quantization import Quantization
from pagewire.kernels.errors import KernelsUnavailableError
from pagewire.kernels.float_linear import choose_float_kernel
from pagewire.kernels.select import Kernels, SelectedOps, select_ops
from pagewire.kv_transfer.layout import KVLayout

logger = logging.getLogger(__name__)


def load_engine(
    path: Path,
    *,
    dtype: str = "bfloat16",
    quantization: Quantization = Quantization.NONE,
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.AUTO,
    device: str = "cpu",
    page_size: int = 64,
    num_pages: int | None = None,
    draft_page_bytes: int = 0,
    max_model_len: int | None = None,
    num_threads: int | None = None,
    kernels: str = "auto",
    deterministic: bool = False,
    parallel: TensorParallel | None = None,
) -> ModelRunner:
    """Load a GGUF file or safetensors directory and allocate its KV cache.

    With `parallel`, one rank's part of both: every rank of the group calls this with equal
    arguments.

    `dtype` is that of what `quantization` and `kv_cache_dtype` leave alone: float32, float16 or
    bfloat16. `num_pages` None sizes the cache from free memory, of which a draft model takes
    `draft_page_bytes` for each page; `max_model_len` None takes the model's own, and `num_threads`
    None leaves torch's (process-wide) setting alone. `kernels` is a value of Kernels. With
    `deterministic`, with the C++ kernels in float32 or those in Triton, logits are the same to the
    bit for a prompt alone or in any batch, in one chunk or many, with or without prefix hits, with
    any number of threads, and for drafts as for single tokens. Raises ModelError,
    MemoryBudgetError, KernelError, RankLost, and LayoutError for a dtype or page size that cannot
    be.
    """
    parallel = parallel or TensorParallel()
    group = parallel.group
    if device == "cpu":
        forms = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
        require_cpu_kernels(kernels, forms)
    selected = select_kernels(
        kernels, device, deterministic=deterministic, fp8=quantization is Quantization.FP8
    )
    if deterministic:
        _check_deterministic(dtype, quantization, selected)
    if kernels == Kernels.TRITON and device == "cpu" and dtype == "bfloat16":
        raise KernelError("Triton's interpreter is wrong in bfloat16; choose dtype float32")
    if kv_cache_dtype is KVCacheDtype.FP8 and not selected.has_fp8_cache:
        raise no_kernels(f"kv_cache_dtype {kv_cache_dtype}", device, instead="int8")
    logger.info("kernels: %s", selected.explanation)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    layout = kv_layout(config, page_size=page_size, dtype=kv_cache_dtype.resolve(dtype))
    length = _max_model_len(config, max_model_len)
    model = load_model(
        checkpoint,
        dtype=getattr(torch, dtype),
        device=device,
        selected=selected,
        quantization=quantization,
        group=group,
    )
    rank_layout = replace(layout, num_kv_heads=model.config.num_kv_heads)
    if num_pages is None:
        num_pages = choose_num_pages(
            rank_layout,
            max_model_len=length,
            # The ranks share the memory of the host; each has a GPU of its own.
            available_bytes=available_bytes(device) // (group.size if device == "cpu" else 1),
            share=default_share(device),
            draft_page_bytes=draft_page_bytes,
        )
    num_pages = group.least(num_pages)
    logger.info(
        "weights take %d MB, %d pages of %s KV cache %d MB",
        model.weight_bytes // 10**6,
        num_pages,
        layout.dtype,
        num_pages * rank_layout.page_bytes // 10**6,
    )
    memory = None
    if parallel.pools is not None:
        memory = parallel.pools.pool(group.rank, num_pages * rank_layout.page_bytes)
    return ModelRunner(
        model,
        KVCache(rank_layout, num_pages, device, memory),
        layout=layout,
        followers=parallel.followers,
        max_model_len=length,
        digest=model_digest(path),
    )


def kv_layout(config: ModelConfig, *, page_size: int, dtype: str) -> KVLayout:
    """How the KV of such a model lies in pages. Raises LayoutError."""
    return KVLayout(
        page_size=page_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )


def select_kernels(
    kernels: str, device: str, *, deterministic: bool = False, fp8: bool = False
) -> SelectedOps:
    """`select_ops` for a value of Kernels; with `fp8` for activations in it.

    Raises KernelError for what cannot run here.
    """
    try:
        return select_ops(Kernels(kernels), device, deterministic=deterministic, fp8=fp8)
    except KernelsUnavailableError as error:
        wanted = "deterministic needs the kernels in C++ or Triton, and " if deterministic else ""
        raise KernelError(f"{wanted}kernels is {kernels}: {error}") from error


def default_matrices(selected: SelectedOps) -> str:
    """How a worker on this CPU stores matrices and what multiplies them, for people."""
    dtype = default_dtype("cpu")
    kernel = choose_float_kernel(selected, getattr(torch, dtype), "cpu")
    quantizations = "int8 or int4" if selected.library else "int8"
    return f"{dtype} by {kernel}; with --quantization {quantizations}"


def _check_deterministic(dtype: str, quantization: Quantization, selected: SelectedOps) -> None:
    if selected.library is not None and dtype != "float32":
        raise KernelError(
            f"deterministic computes in float32 on a CPU; dtype is {dtype}: choose float32"
        )
    if quantization is not Quantization.NONE:
        raise KernelError(
            "deterministic computes with matrices in floating point; quantization is "
            f"{quantization}: choose none"
        )


def _max_model_len(config: ModelConfig, wanted: int | None) -> int:
    if wanted is None:
        return config.max_model_len
    if not 1 <= wanted <= config.max_model_len:
        raise ModelError(
            f"max_model_len is {wanted}; the model was trained for 1 to {config.max_model_len}"
        )
    return wanted
