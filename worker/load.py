"""The engine that a WorkerConfig asks for, whole or as one rank of several."""

from pathlib import Path

from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__

from pagewire.engine.copy_stream import CopyStream
from pagewire.engine.cuda_copy_stream import CudaCopyStream
from pagewire.engine.device import require_device
from pagewire.engine.load import load_engine
from pagewire.engine.load_draft import draft_page_bytes
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.process_group import join_group
from pagewire.engine.parallel.shared_pools import SharedPools
from pagewire.engine.parallel.tensor_parallel import Followers, NoFollowers, TensorParallel
from pagewire.worker.config import WorkerConfig


def load_worker_engine(config: WorkerConfig, parallel: TensorParallel | None = None) -> ModelRunner:
    """Load it, as one rank of several with `parallel`.

    Raises DeviceError when its device is not there, and what `load_engine` raises.
    """
    require_device(config.device)
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


def copy_stream(config: WorkerConfig) -> CopyStream | None:
    """What reaches the pages of a worker on a device; None: they are in host memory."""
    return None if config.device == "cpu" else CudaCopyStream(config.device)


def join_ranks(
    config: WorkerConfig,
    rank: int,
    *,
    store_path: str,
    memory: int,
    followers: Followers | None = None,
) -> TensorParallel:
    """The place of `rank` among the ranks of a worker, once all of them are there. Blocks.

    `store_path`: of a file through which they find each other; `memory`: the descriptor of their
    pools. Raises RankLost.
    """
    size = config.tensor_parallel_size
    pools = SharedPools(memory, size)
    group = join_group(FileStore(store_path, size), rank, size, in_rank_order=config.deterministic)
    return TensorParallel(
        group=group,
        followers=followers or NoFollowers(),
        pool_memory=lambda num_bytes: pools.pool(rank, num_bytes),
    )
