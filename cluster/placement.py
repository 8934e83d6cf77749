"""Which workers an instance has, and what each of them gets of the machine.

Pure but for `available_cores`, which asks the operating system.
"""

import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from pagewire.cluster.config import ServeConfig
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.worker.config import Role, WorkerConfig

# Drafts of a decode step, shared out among its rows. It bounds how long a step takes and how many
# rows of logits it holds; how many drafts pay is decided for each sequence.
MAX_DRAFT_TOKENS = 64

# What one step takes at most, by device. A GPU is done with less before Python has launched the
# kernels of the next step, and reads its weights for 256 tokens in the time of one.
_MAX_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
_MAX_BATCH_SIZE = {"cpu": 32, "cuda": 256}

_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # "quota period" in microseconds, or "max …"


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _container_cores() or cores or 1))


def _container_cores() -> int | None:
    try:
        quota, period = _CGROUP_CPU_LIMIT.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else -(-int(quota) // int(period))


def worker_configs(
    config: ServeConfig,
    *,
    model: Path,
    draft_model: Path | None = None,
    served_model: str,
    router: str,
    cores: int,
    core_board: Path,
    dtype: str,
    prefix_cache_secret: str | None,
    device: str = "cpu",
) -> tuple[WorkerConfig, ...]:
    """The start parameters of every worker, prefill workers first.

    `router` is host:port of the router's Membership service. On a CPU `cores` are shared out
    step by step, on the board `core_board`, unless the number of threads was chosen; with `device`
    cuda each rank of a worker has a GPU of its own, and cores only load its model.
    `dtype` is what auto means, the same for all.
    `prefix_cache_secret` is hexadecimal; without it nothing is cached.
    """
    names = [(Role.PREFILL, index) for index in range(config.prefill)]
    names += [(Role.DECODE, index) for index in range(config.decode)]
    num_ranks = [tensor_parallel_size(config, role) for role, _ in names]
    first_gpus = [*accumulate(num_ranks, initial=0)][:-1]
    on_cpu = device == "cpu"
    return tuple(
        WorkerConfig(
            name=f"{role}-{index}",
            role=role,
            model=str(model),
            served_model=served_model,
            routers=(router,),
            transport=config.transport,
            kv_host=config.kv_host,
            kv_tls=config.kv_tls,
            insecure_kv=config.insecure_kv,
            device=device,
            gpu=None if on_cpu else gpu,
            dtype=_dtype(config, dtype, device),
            quantization=config.quantization,
            kv_cache_dtype=_kv_cache_dtype(config, role),
            tensor_parallel_size=size,
            page_size=_page_size(config, role),
            num_pages=config.num_pages,
            max_model_len=config.max_model_len,
            num_threads=config.num_threads or cores,
            core_board=str(core_board) if on_cpu and not config.num_threads else None,
            core_board_slot=slot,
            kernels=config.kernels,
            deterministic=config.deterministic,
            max_batch_tokens=config.max_batch_tokens or _MAX_BATCH_TOKENS[device],
            max_batch_size=config.max_batch_size or _MAX_BATCH_SIZE[device],
            lease_s=config.lease_s,
            max_parked_share=config.max_parked_share,
            max_waiting_handoffs=config.max_waiting_handoffs,
            max_draft_tokens=0 if config.speculation == "none" else MAX_DRAFT_TOKENS,
            draft_model=str(draft_model) if draft_model and role is Role.DECODE else None,
            draft_quantization=config.draft_quantization,
            prefix_cache_secret=prefix_cache_secret,
        )
        for slot, ((role, index), size, gpu) in enumerate(
            zip(names, num_ranks, first_gpus, strict=True)
        )
    )


def _dtype(config: ServeConfig, auto: str, device: str) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if config.deterministic and device == "cpu" else auto


def _kv_cache_dtype(config: ServeConfig, role: Role) -> KVCacheDtype:
    if role is Role.PREFILL or config.decode_kv_cache_dtype is None:
        return config.kv_cache_dtype
    return config.decode_kv_cache_dtype


def _page_size(config: ServeConfig, role: Role) -> int:
    if role is Role.PREFILL or config.decode_page_size is None:
        return config.page_size
    return config.decode_page_size


def tensor_parallel_size(config: ServeConfig, role: Role) -> int:
    """Ranks of a worker."""
    sizes = {
        Role.PREFILL: config.prefill_tensor_parallel_size,
        Role.DECODE: config.decode_tensor_parallel_size,
    }
    return sizes[role] or config.tensor_parallel_size


def worker_environment(config: WorkerConfig) -> dict[str, str]:
    """Variables that must be set in a worker's process before it loads torch."""
    return {
        "OMP_NUM_THREADS": str(config.num_threads),
        "MKL_NUM_THREADS": str(config.num_threads),
        # OpenMP's default is to spin at the end of every parallel region; on cores shared with
        # another worker one such wait costs a scheduler quantum, and a step of 20 ms becomes 200.
        "GOMP_SPINCOUNT": "5000",
    }


def gpu_environment(config: WorkerConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that show a worker its own GPUs alone, one a rank, where no scheduler sets them.

    `environment` is that of the launcher, which may have been shown some GPUs only.
    """
    if config.gpu is None:
        return {}
    mine = range(config.gpu, config.gpu + config.tensor_parallel_size)
    visible = [name for name in environment.get(_VISIBLE_GPUS, "").split(",") if name]
    return {_VISIBLE_GPUS: ",".join(visible[gpu] if visible else str(gpu) for gpu in mine)}
