"""Which workers there are, and how cores are shared out among them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.placement import (
    available_cores,
    gpu_environment,
    worker_configs,
    worker_environment,
)
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.quantization import Quantization
from pagewire.kv_transfer.tls import TlsFiles
from pagewire.worker.config import Role, WorkerConfig


def place(
    config: ServeConfig, cores: int, draft_model: Path | None = None, device: str = "cpu"
) -> tuple[WorkerConfig, ...]:
    return worker_configs(
        config,
        model=Path("/m.gguf"),
        draft_model=draft_model,
        served_model="m",
        router="127.0.0.1:1",
        cores=cores,
        prefix_cache_secret=None,
        core_board=Path("/board"),
        dtype="bfloat16",
        device=device,
    )


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 128))
def test_every_worker_has_a_name_a_role_and_a_slot(prefill: int, decode: int, cores: int) -> None:
    workers = place(ServeConfig(prefill=prefill, decode=decode), cores)
    assert len({worker.name for worker in workers}) == len(workers) == prefill + decode
    assert sum(worker.role is Role.PREFILL for worker in workers) == prefill
    assert all(worker.name.startswith(worker.role) for worker in workers)
    assert [worker.core_board_slot for worker in workers] == list(range(len(workers)))


def test_cores_are_shared_on_a_board() -> None:
    workers = place(ServeConfig(), 2)
    assert [(item.name, item.num_threads, item.core_board) for item in workers] == [
        ("prefill-0", 2, "/board"),
        ("decode-0", 2, "/board"),
    ]


def test_every_worker_has_a_gpu_of_its_own_and_shares_no_cores() -> None:
    workers = place(ServeConfig(prefill=2), 8, device="cuda")
    assert [(item.device, item.gpu) for item in workers] == [("cuda", gpu) for gpu in range(3)]
    assert {item.core_board for item in workers} == {None}
    assert [item.gpu for item in place(ServeConfig(), 8)] == [None, None]


def test_the_ranks_of_a_worker_have_neighbouring_gpus() -> None:
    config = ServeConfig(prefill=2, tensor_parallel_size=2, decode_tensor_parallel_size=4)
    workers = place(config, 8, device="cuda")
    assert [item.gpu for item in workers] == [0, 2, 4]
    environment = {"CUDA_VISIBLE_DEVICES": "9,8,7,6,5,4,3,2"}
    assert [gpu_environment(item, environment) for item in workers] == [
        {"CUDA_VISIBLE_DEVICES": names} for names in ("9,8", "7,6", "5,4,3,2")
    ]
    assert gpu_environment(workers[1], {}) == {"CUDA_VISIBLE_DEVICES": "2,3"}


@pytest.mark.parametrize(("device", "sizes"), [("cpu", (512, 32)), ("cuda", (2048, 256))])
def test_steps_are_as_large_as_the_device_wants_them(device: str, sizes: tuple[int, int]) -> None:
    [worker, _] = place(ServeConfig(), 8, device=device)
    assert (worker.max_batch_tokens, worker.max_batch_size) == sizes
    [worker, _] = place(ServeConfig(max_batch_tokens=7, max_batch_size=3), 8, device=device)
    assert (worker.max_batch_tokens, worker.max_batch_size) == (7, 3)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1"]),
        ("", ["0", "1"]),
        ("5,3,7", ["5", "3"]),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_a_plain_process_is_shown_its_gpu_alone(visible: str | None, expected: list[str]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    shown = [
        gpu_environment(worker, environment) for worker in place(ServeConfig(), 8, device="cuda")
    ]
    assert shown == [{"CUDA_VISIBLE_DEVICES": name} for name in expected]
    assert gpu_environment(place(ServeConfig(), 8)[0], environment) == {}


def test_auto_is_the_dtype_that_the_machine_is_fast_in() -> None:
    assert {worker.dtype for worker in place(ServeConfig(), 2)} == {"bfloat16"}
    assert {worker.dtype for worker in place(ServeConfig(dtype="float32"), 2)} == {"float32"}


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_deterministic_means_float32_on_a_cpu(device: str, dtype: str) -> None:
    workers = place(ServeConfig(deterministic=True), 2, device=device)
    assert {(worker.dtype, worker.deterministic) for worker in workers} == {(dtype, True)}


def test_chosen_threads_win() -> None:
    workers = place(ServeConfig(num_threads=5), 2)
    assert {(worker.num_threads, worker.core_board) for worker in workers} == {(5, None)}


def test_parameters_reach_the_worker() -> None:
    config = ServeConfig(
        transport="tcp",
        dtype="float32",
        quantization=Quantization.INT8,
        kv_cache_dtype=KVCacheDtype.INT8,
        page_size=128,
        num_pages=9,
        max_model_len=77,
    )
    worker = place(config, 1)[0]
    assert (worker.transport, worker.dtype, worker.page_size) == ("tcp", "float32", 128)
    assert worker.quantization is Quantization.INT8
    assert worker.kv_cache_dtype is KVCacheDtype.INT8
    assert (worker.num_pages, worker.max_model_len) == (9, 77)
    assert worker.routers == ("127.0.0.1:1",)
    assert WorkerConfig.from_json(worker.to_json()) == worker


def test_limits_of_failed_hand_offs_reach_the_workers() -> None:
    config = ServeConfig(lease_s=4.0, max_parked_share=0.25, max_waiting_handoffs=3)
    for worker in place(config, 1):
        assert (worker.lease_s, worker.max_parked_share) == (4.0, 0.25)
        assert worker.max_waiting_handoffs == 3
        assert WorkerConfig.from_json(worker.to_json()) == worker


def test_decode_workers_may_have_other_pages() -> None:
    config = ServeConfig(
        page_size=128, decode_page_size=32, decode_kv_cache_dtype=KVCacheDtype.INT8
    )
    assert [(item.page_size, item.kv_cache_dtype) for item in place(config, 1)] == [
        (128, KVCacheDtype.AUTO),
        (32, KVCacheDtype.INT8),
    ]
    same = place(ServeConfig(page_size=16, kv_cache_dtype=KVCacheDtype.INT8), 1)
    assert {(item.page_size, item.kv_cache_dtype) for item in same} == {(16, KVCacheDtype.INT8)}


def test_decode_workers_alone_have_a_draft_model() -> None:
    config = ServeConfig(
        speculation="draft", draft_model="small", draft_quantization=Quantization.INT8
    )
    prefill, decode = place(config, 1, draft_model=Path("/small.gguf"))
    assert (prefill.draft_model, decode.draft_model) == (None, "/small.gguf")
    assert decode.draft_quantization is Quantization.INT8
    assert decode.max_draft_tokens > 0
    assert WorkerConfig.from_json(decode.to_json()) == decode


def test_nothing_is_drafted_unless_asked() -> None:
    assert {worker.max_draft_tokens for worker in place(ServeConfig(), 1)} == {0}


def test_threads_reach_openmp() -> None:
    worker = place(ServeConfig(num_threads=3), 1)[0]
    assert worker_environment(worker)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1), ("garbage", None)],
)
def test_container_limit(
    limit: str, cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    monkeypatch.setattr("pagewire.cluster.placement._CGROUP_CPU_LIMIT", tmp_path / "none")
    unlimited = available_cores()
    monkeypatch.setattr("pagewire.cluster.placement._CGROUP_CPU_LIMIT", file)
    assert available_cores() == (cores or unlimited)


def test_workers_know_how_kv_pages_are_protected() -> None:
    encrypted = ServeConfig(
        kv_host="192.0.2.7", kv_tls_cert="/w.pem", kv_tls_key="/w.key", kv_tls_ca="/ca.pem"
    )
    for worker in place(encrypted, 2):
        assert worker.kv_host == "192.0.2.7" and not worker.insecure_kv
        assert worker.kv_tls == TlsFiles(cert="/w.pem", key="/w.key", ca="/ca.pem")
        assert WorkerConfig.from_json(worker.to_json()) == worker
    [worker, _] = place(ServeConfig(kv_host="192.0.2.7", insecure_kv=True), 2)
    assert worker.insecure_kv and worker.kv_tls is None


def test_roles_may_have_different_numbers_of_ranks() -> None:
    workers = place(ServeConfig(tensor_parallel_size=2, decode_tensor_parallel_size=4), 8)
    assert [(item.role, item.tensor_parallel_size) for item in workers] == [
        (Role.PREFILL, 2),
        (Role.DECODE, 4),
    ]


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_ranks_of_a_worker_share_its_threads(num_threads: int, size: int) -> None:
    config = ServeConfig(num_threads=num_threads, prefill_tensor_parallel_size=size)
    worker, single = place(config, 2)
    assert worker.threads_per_rank == max(1, num_threads // size)
    assert single.threads_per_rank == num_threads
