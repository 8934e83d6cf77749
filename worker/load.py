"""The engine that a WorkerConfig asks for, whole or as one rank of several."""

from pathlib import Path

from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.distributed_c10d import Store

from pagewire.engine.copy_stream import CopyStream
from pagewire.engine.cuda_copy_stream import CudaCopyStream
from pagewire.engine.cuda_runtime import CudaRuntime
from pagewire.engine.device import require_device
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.load import load_engine
from pagewire.engine.load_draft import draft_page_bytes
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.gpu_pools import CudaMemory, GpuPools
from pagewire.engine.parallel.nccl_ranks import rank_device, require_gpus
from pagewire.engine.parallel.process_group import join_group
from pagewire.engine.parallel.rank_pools import RankPools
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
        device=rank_device(config.device, parallel.group.rank) if parallel else config.device,
        page_size=config.page_size,
        num_pages=config.num_pages,
        draft_page_bytes=page_bytes,
        max_model_len=config.max_model_len,
        num_threads=config.threads_per_rank,
        kernels=config.kernels,
        deterministic=config.deterministic,
        parallel=parallel,
    )


def copy_streams(config: WorkerConfig) -> tuple[CopyStream, ...]:
    """What reaches the pages of a worker on devices, by rank; none: they are in host memory."""
    if config.device == "cpu":
        return ()
    if config.tensor_parallel_size == 1:
        return (CudaCopyStream(config.device),)
    runtime = CudaRuntime.of_torch()
    return tuple(
        CudaCopyStream(rank_device(config.device, rank), runtime)
        for rank in range(config.tensor_parallel_size)
    )


def join_ranks(
    config: WorkerConfig,
    rank: int,
    *,
    store_path: str,
    memory: int | None,
    followers: Followers | None = None,
) -> TensorParallel:
    """The place of `rank` among the ranks of a worker, once all of them are there. Blocks.

    `store_path`: of a file through which they find each other; `memory`: the descriptor of their
    pools, None where these are on GPUs. Raises RankLost, and EngineError for GPUs that cannot be
    had.
    """
    size = config.tensor_parallel_size
    store = FileStore(store_path, size)
    pools: RankPools
    pools = _gpu_pools(config, rank, store) if memory is None else SharedPools(memory, size)
    group = join_group(store, rank, size, device=config.device, in_rank_order=config.deterministic)
    return TensorParallel(group=group, followers=followers or NoFollowers(), pools=pools)


def _gpu_pools(config: WorkerConfig, rank: int, store: Store) -> GpuPools:
    require_gpus(config.device, config.tensor_parallel_size)
    pools = GpuPools(store, rank, config.device, CudaMemory(CudaRuntime.of_torch()))
    if rank == 0:  # the others join it, and then find out how much memory is free
        pools.reach(config.tensor_parallel_size)
    return pools


def rank_caches(runner: ModelRunner, parallel: TensorParallel) -> tuple[KVCache, ...]:
    """The KV caches of all ranks, which rank 0 reaches; `runner` is its own.

    Raises what `RankPools.pool` raises.
    """
    mine = runner.kv_cache
    assert parallel.pools is not None, "it is one of several ranks"
    num_bytes = mine.num_pages * mine.layout.page_bytes
    others = [parallel.pools.pool(rank, num_bytes) for rank in range(1, parallel.group.size)]
    return (mine, *(KVCache(mine.layout, mine.num_pages, memory=pool) for pool in others))
