"""The stream of copies on a GPU: `TRITON_INTERPRET=0 pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch
from fake_device import page_sum

from pagewire.engine.cuda_copy_stream import CudaCopyStream
from pagewire.engine.cuda_runtime import CudaRuntime
from pagewire.engine.device_pages import DevicePages
from pagewire.engine.device_shards import DeviceShards
from pagewire.engine.kv_cache import KVCache, view_pages
from pagewire.kv_transfer.checksum import checksum_of_sum
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.worker.device_checksums import DeviceChecksums

pytestmark = pytest.mark.gpu
LAYOUT = KVLayout(page_size=64, num_layers=8, num_kv_heads=8, head_dim=128, dtype="bfloat16")
NUM_PAGES = 12
PART = FrameRange(first_page=0, num_pages=4, first_layer=2, num_layers=4)
SOURCES, TARGETS = (3, 11, 4, 0), (1, 2, 8, 5)


def cache() -> KVCache:
    made = KVCache(LAYOUT, NUM_PAGES, device="cuda")
    made.pool.random_(0, 256)
    return made


def test_pages_go_from_one_pool_to_another_behind_the_step_that_fills_them() -> None:
    sender, receiver, copies = cache(), cache(), CudaCopyStream("cuda")
    payload = copies.host_memory(PART.num_bytes(LAYOUT))
    untouched = receiver.pool.clone()
    _compute(100_000_000)  # a step: without it the copy would read too early
    sender.pages.values.fill_(2.5)
    DevicePages(sender, copies).gather(PART, SOURCES, payload, after=copies.mark()).wait()
    DevicePages(receiver, copies).write(payload.numpy(), PART, LAYOUT, TARGETS)
    assert receiver.pages.values[list(TARGETS), 2:6].eq(2.5).all()
    rest = [page for page in range(NUM_PAGES) if page not in TARGETS]
    assert torch.equal(receiver.pool[rest], untouched[rest])


def test_copies_do_not_wait_for_steps_that_they_were_not_told_of() -> None:
    pages, copies = cache(), CudaCopyStream("cuda")
    payload = copies.host_memory(PART.num_bytes(LAYOUT))
    computed = copies.mark()
    _compute(2_000_000_000)
    step = torch.cuda.Event()  # type: ignore[no-untyped-call]
    step.record()
    DevicePages(pages, copies).gather(PART, SOURCES, payload, after=computed).wait()
    assert not step.query()  # type: ignore[no-untyped-call]
    step.synchronize()


@pytest.mark.parametrize("page_size", [16, 128])
def test_pages_of_another_size_or_dtype_are_converted_on_the_gpu(page_size: int) -> None:
    copies, table = CudaCopyStream("cuda"), tuple(range(32))
    payload = copies.host_memory(PART.num_bytes(LAYOUT))
    payload.view(torch.bfloat16).normal_()
    for dtype in ("bfloat16", "float16", "int8"):
        layout = KVLayout(
            page_size=page_size, num_layers=8, num_kv_heads=8, head_dim=128, dtype=dtype
        )
        caches = [KVCache(layout, 32, device=device) for device in ("cuda", "cpu")]
        for each in caches:
            each.pool.zero_()
            DevicePages(each, copies).write(payload.numpy(), PART, LAYOUT, table)
        on_gpu, on_cpu = (each.pages.values.float().cpu() for each in caches)
        assert torch.equal(on_gpu, on_cpu)


def test_pages_of_ranks_are_gathered_from_all_and_scattered_to_all() -> None:
    """Two ranks on one GPU: their layers lie apart in a payload of host memory."""
    runtime = CudaRuntime.of_torch()
    of_rank = replace(LAYOUT, num_kv_heads=LAYOUT.num_kv_heads // 2)
    copies = [CudaCopyStream("cuda", runtime) for _ in range(2)]
    caches = [KVCache(of_rank, NUM_PAGES, device="cuda") for _ in copies]
    for number, each in enumerate(caches, start=1):
        each.pages.values.fill_(number)
    pages = DeviceShards(LAYOUT, caches, copies)
    payload = copies[0].host_memory(PART.num_bytes(LAYOUT)).zero_()
    pages.gather(PART, SOURCES, payload, after=copies[0].mark()).wait()
    heads = view_pages(payload.view(PART.num_pages, -1), LAYOUT, num_layers=PART.num_layers).values
    assert heads[:, :, :4].eq(1).all() and heads[:, :, 4:].eq(2).all()

    for each in caches:
        each.pool.zero_()
    torch.cuda.synchronize()
    pages.write(payload.numpy(), PART, LAYOUT, TARGETS)
    for number, each in enumerate(caches, start=1):
        assert each.pages.values[list(TARGETS), 2:6].eq(number).all()
        rest = [page for page in range(NUM_PAGES) if page not in TARGETS]
        assert not each.pool[rest].any()


def test_frames_are_copied_and_summed_on_the_gpu() -> None:
    pages, copies = cache(), CudaCopyStream("cuda")
    data = copies.device_memory(PART.num_bytes(LAYOUT))
    checksums = DeviceChecksums(copies, num_buffers=2)
    DevicePages(pages, copies).gather(PART, SOURCES, data)
    checksums.begin(1, data).wait()
    words = data.cpu().numpy().view("uint64")
    assert checksums.value(1, len(data)) == checksum_of_sum(page_sum(words), len(data))
    assert copies.lend(data).__cuda_array_interface__["data"][0] == data.data_ptr()


def _compute(num_cycles: int) -> None:
    """Keep the GPU busy in the stream of steps."""
    torch.cuda._sleep(num_cycles)  # type: ignore[no-untyped-call]
