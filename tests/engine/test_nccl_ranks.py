"""Ranks on GPUs: which GPU each has, what is refused, and over gloo what their calls do."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from pagewire.engine.errors import EngineError
from pagewire.engine.parallel import process_group
from pagewire.engine.parallel.nccl_ranks import rank_device, require_gpus
from pagewire.engine.parallel.process_group import ProcessGroup, join_group
from pagewire.engine.parallel.rank_group import RankLost, SingleRank


@pytest.mark.parametrize(
    ("device", "rank", "expected"),
    [("cuda", 0, "cuda:0"), ("cuda", 3, "cuda:3"), ("cuda:2", 1, "cuda:3"), ("cpu", 1, "cpu")],
)
def test_every_rank_has_a_gpu_of_its_own(device: str, rank: int, expected: str) -> None:
    assert rank_device(device, rank) == expected


@pytest.mark.parametrize(
    ("has_nccl", "num_gpus", "message"),
    [
        (False, 8, "size is 2 on device cuda:1, and this build of torch has no NCCL; set tensor_"),
        (True, 2, "takes GPUs 1 to 2, and torch finds 2; .* see CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_missing_is_named(
    has_nccl: bool, num_gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(EngineError, match=message):
        join_group(HashStore(), 0, 2, device="cuda:1")


def test_as_many_gpus_as_ranks_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    require_gpus("cuda:1", 2)


def test_a_library_that_fails_is_a_rank_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(process_group, "require_gpus", lambda device, size: None)
    monkeypatch.setattr(process_group, "new_group", fail)
    with pytest.raises(RankLost, match="rank 0 of 2 cannot join its group: NCCL error"):
        join_group(HashStore(), 0, 2, device="cuda")


def test_a_group_can_be_connected_before_its_first_step() -> None:
    store = HashStore()

    def work(rank: int) -> float:
        group = join_group(store, rank, 2, timeout=timedelta(seconds=20))
        group.connect()
        group.barrier()
        return float(group.all_reduce(torch.tensor([rank + 1.0])))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(work, range(2))) == [3.0, 3.0]


class Group:
    """A process group of NCCL, of one rank, whose operations take the time of the group."""

    def __init__(self) -> None:
        self.options = SimpleNamespace(_timeout=timedelta(seconds=60))
        self.waited: list[timedelta] = []
        self.is_aborted = False

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.options._timeout = timeout

    def allreduce(self, tensors: list[torch.Tensor], options: object) -> None:
        self.waited.append(self.options._timeout)

    def abort(self) -> None:
        self.is_aborted = True


def test_ranks_may_load_longer_than_a_step_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessGroup, "is_recordable", True)
    group = Group()
    joined = ProcessGroup(group, "cpu", in_rank_order=False)
    assert joined.least(5) == 5
    joined.barrier()
    assert group.waited == [timedelta(minutes=30), timedelta(seconds=60)]


def test_a_group_on_gpus_can_be_ended_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    joined = ProcessGroup(group, "cpu", in_rank_order=False)
    joined.abort()
    assert not group.is_aborted  # gloo hears of the end of a rank itself
    monkeypatch.setattr(ProcessGroup, "is_recordable", True)
    joined.abort()
    assert group.is_aborted


def test_a_recording_holds_the_calls_of_gpus_only() -> None:
    assert SingleRank().is_recordable
    assert not join_group(HashStore(), 0, 1).is_recordable
