"""Pages that are copied, cut otherwise and narrowed on their way to another worker."""

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu_stages.cases.kernel_case import KernelCase, NamedCase, Setting, same_bytes
from pagewire.engine.kv_cache import KVCache
from pagewire.kernels.gpu.page_checksum import begin_checksum
from pagewire.kernels.gpu.pages import PagePart, gather_pages, scatter_pages
from pagewire.kernels.gpu.requantize_pages import requantize_pages
from pagewire.kernels.gpu.retile import retile_pages
from pagewire.kernels.kv_pool import quantize_vectors

SMALL_PAGE = 16  # of the worker with the other pages


def gather_case(setting: Setting) -> KernelCase:
    cache = _whole(setting)
    pages = setting.permutation(cache.num_pages)
    return KernelCase(
        run=lambda: gather_pages(cache.pool, pages, _all_of(cache)),
        expected=lambda: cache.pool[pages.long()][:, None].cpu(),
        num_bytes=2 * cache.pool.nbytes,
        max_ratio=1.2,
    )


def scatter_case(setting: Setting) -> KernelCase:
    cache, payload = _whole(setting), _whole(setting).pool[:, None]
    pages = setting.permutation(cache.num_pages)
    cache.pool.fill_(255)

    def expected() -> Tensor:
        return payload[pages.argsort()][:, 0].cpu()

    return KernelCase(
        run=lambda: scatter_pages(payload, cache.pool, pages, _all_of(cache)),
        read=lambda _: cache.pool,
        expected=expected,
        num_bytes=2 * cache.pool.nbytes,
        max_ratio=1.2,
    )


def retile_case(setting: Setting) -> KernelCase:
    """Into pages of another size: token by token the same K and V."""
    source = _whole(setting)
    per_page = source.layout.page_size // SMALL_PAGE
    target = setting.cache(
        source.num_pages * per_page, source.layout.num_layers, page_size=SMALL_PAGE
    )
    table = setting.permutation(target.num_pages)
    target.pool.fill_(255)
    values = source.pages.values  # [pages, layers, heads, 2, page_size, head_dim]

    def expected() -> Tensor:
        pages, layers, heads, _, _, head_dim = values.shape
        parts = values.reshape(pages, layers, heads, 2, per_page, SMALL_PAGE, head_dim)
        parts = parts.movedim(4, 1).flatten(0, 1)
        return same_bytes(parts.cpu())

    return KernelCase(
        run=lambda: retile_pages(
            source.pages, target.pages, table, first_token=0, first_layer=0, first_head=0
        ),
        read=lambda _: same_bytes(target.pages.values[table.long()].cpu()),
        expected=expected,
        num_bytes=2 * source.pool.nbytes,
        max_ratio=1.2,
    )


def requantize_case(setting: Setting, *, dtype: str) -> KernelCase:
    source = _whole(setting)
    target = setting.cache(source.num_pages, source.layout.num_layers, dtype)
    pages = torch.arange(source.num_pages, dtype=torch.int32, device=setting.scale.device)
    targets = setting.permutation(target.num_pages)
    target.pool.fill_(255)

    def read(_: None) -> Tensor:
        pool = target.pages
        assert pool.scales is not None
        return same_bytes(pool.values[targets.long()].cpu(), pool.scales[targets.long()].cpu())

    return KernelCase(
        run=lambda: requantize_pages(source.pages, target.pages, pages, targets),
        read=read,
        expected=lambda: same_bytes(
            *quantize_vectors(source.pages.values.float().cpu(), target.pages.values.dtype)
        ),
        num_bytes=source.pool.nbytes + target.pool.nbytes,
        max_ratio=1.3,
    )


def checksum_case(setting: Setting) -> KernelCase:
    """The sum that a checksum is made of, over all bytes of many pages."""
    data = _whole(setting).pool.view(-1)
    total = torch.zeros(1, dtype=torch.int64, device=data.device)

    def expected() -> Tensor:
        words = data.cpu().numpy().view(np.uint64)
        terms = _split_mix(_split_mix(np.arange(len(words), dtype=np.uint64)) + words)
        return torch.from_numpy(terms.sum(keepdims=True).view(np.int64))

    return KernelCase(
        run=lambda: begin_checksum(data, total),
        read=lambda _: total,
        expected=expected,
        num_bytes=data.nbytes,
        max_ratio=1.3,
    )


CASES = (
    NamedCase(name="page checksum", make=checksum_case),
    NamedCase(name="page gather", make=gather_case),
    NamedCase(name="page scatter", make=scatter_case),
    NamedCase(name="page re-tile", make=retile_case),
    NamedCase(name="page requantise to int8", make=partial(requantize_case, dtype="int8")),
    NamedCase(
        name="page requantise to fp8",
        make=partial(requantize_case, dtype="float8_e4m3fn"),
        needs_fp8=True,
    ),
)


def _whole(setting: Setting) -> KVCache:
    """Pages of all layers."""
    return setting.cache(setting.sizes.num_pages, setting.scale.model.num_layers)


def _split_mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64 as its authors wrote it down."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _all_of(cache: KVCache) -> PagePart:
    size = cache.layout.page_bytes
    return PagePart(offset=0, num_layers=1, layer_bytes=size, run_bytes=size)
