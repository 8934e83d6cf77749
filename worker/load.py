"""The engine that a WorkerConfig asks for."""

from pathlib import Path

from pagewire.engine.load import load_engine
from pagewire.engine.load_draft import draft_page_bytes
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.tensor_parallel import TensorParallel
from pagewire.worker.config import WorkerConfig


def load_worker_engine(config: WorkerConfig, parallel: TensorParallel | None = None) -> ModelRunner:
    """Load it, as one rank of several with `parallel`; raises what `load_engine` raises."""
    page_bytes = 0
    if config.draft_model is not None:
        page_bytes = draft_page_bytes(
            Path(config.draft_model), page_size=config.page_size, dtype=config.dtype
        )
    return load_engine(
        Path(config.model),
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        device=config.device,
        page_size=config.page_size,
        num_pages=config.num_pages,
        draft_page_bytes=page_bytes,
        max_model_len=config.max_model_len,
        num_threads=config.threads_per_rank,
        kernels=config.kernels,
        deterministic=config.deterministic,
        parallel=parallel,
    )
