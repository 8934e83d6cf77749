"""How many pages of KV cache a worker takes when nobody said."""

from pathlib import Path

import torch

from pagewire.engine.errors import MemoryBudgetError
from pagewire.kv_transfer.layout import KVLayout

CPU_SHARE = 0.25  # several workers, Ray and the clients share a machine
CUDA_SHARE = 0.9
CEILING_BYTES = 64 << 30

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def choose_num_pages(
    layout: KVLayout,
    *,
    max_model_len: int,
    available_bytes: int,
    share: float,
    ceiling_bytes: int = CEILING_BYTES,
    draft_page_bytes: int = 0,
) -> int:
    """Pages that take `share` of the available memory, at most `ceiling_bytes`.

    `draft_page_bytes` is what each takes besides, in the pool of a draft model. At least one
    sequence of `max_model_len` tokens, even if that takes more than the share or the ceiling.
    Raises MemoryBudgetError when not even that is available.
    """
    floor = layout.num_pages(max_model_len)
    page_bytes = layout.page_bytes + draft_page_bytes
    if floor * page_bytes > available_bytes:
        raise MemoryBudgetError(
            f"one sequence of {max_model_len} tokens needs {_mib(floor * page_bytes)} MiB "
            f"of KV cache, but {_mib(available_bytes)} MiB are free; "
            "lower max_model_len or free memory"
        )
    budget = min(int(available_bytes * share), ceiling_bytes)
    return max(floor, budget // page_bytes)


def default_share(device: str) -> float:
    """The part of the available memory that one worker takes for its KV cache."""
    return CUDA_SHARE if device.startswith("cuda") else CPU_SHARE


def available_bytes(device: str) -> int:
    """Bytes that this process could still allocate on `device`.

    Raises MemoryBudgetError when the system does not say.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what was needed to quantise weights, and is free since
        free, _ = torch.cuda.mem_get_info(device)
        return free
    try:
        meminfo = _MEMINFO.read_text(encoding="ascii")
    except OSError as error:
        raise MemoryBudgetError(f"{_MEMINFO} cannot be read ({error}); set num_pages") from error
    return min(
        value for value in (parse_meminfo(meminfo), _cgroup_available()) if value is not None
    )


def parse_meminfo(text: str) -> int:
    """Bytes of MemAvailable in the text of /proc/meminfo. Raises MemoryBudgetError without it."""
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise MemoryBudgetError(f"{_MEMINFO} has no MemAvailable; set num_pages")


def _cgroup_available() -> int | None:
    """Bytes that a container's limit leaves; None outside of one."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        current = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - current)


def _mib(num_bytes: int) -> int:
    return num_bytes >> 20
