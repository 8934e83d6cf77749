"""The table of launches: every entry is whole, and is what the kernels are launched with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tune_kernels
from paged_case import PagedCase, Shape
from unread_device import UnreadDevice, unread_device

from pagewire.kernels.gpu import decode_attention, prefill_attention
from pagewire.kernels.gpu.launch_table import DEFAULT, PATH, launch_table
from pagewire.kernels.gpu.variant import LaunchConfig
from pagewire.kernels.triton_ops import TritonOps, find_gpu


@pytest.mark.parametrize("gpu", json.loads(PATH.read_text()))
def test_entries_are_whole(gpu: str) -> None:
    table = launch_table(gpu)
    for launch in (table.decode_attention, table.prefill_attention):
        assert launch.num_warps in (1, 2, 4, 8, 16) and 1 <= launch.num_stages <= 8


def test_a_gpu_without_an_entry_takes_the_launches_that_are_compiled_in_tests() -> None:
    table = launch_table("a GPU that nobody has measured")
    assert table == launch_table(DEFAULT)
    assert table.decode_attention == decode_attention.LAUNCH
    assert table.prefill_attention == prefill_attention.LAUNCH


@pytest.mark.parametrize(
    ("rows", "kernel"), [(((1, 20),), "_decode_kernel"), (((3, 20),), "_prefill_kernel")]
)
def test_kernels_are_launched_as_the_table_says(
    rows: tuple[tuple[int, int], ...], kernel: str
) -> None:
    launches = replace(
        launch_table(DEFAULT),
        decode_attention=LaunchConfig(num_warps=2, num_stages=5),
        prefill_attention=LaunchConfig(num_warps=2, num_stages=5),
    )
    case = PagedCase(Shape(rows=rows), torch.float16)
    ops = TritonOps(find_gpu("cpu"), launches=launches)
    device: UnreadDevice
    with unread_device() as device:
        ops.plan_attention(case.batch, scale=1.0, window=None).run(case.q, case.pool, 0)
    (key,) = (each for each in device.specialisations if kernel in each)
    assert {("num_warps", 2), ("num_stages", 5)} <= set(key)


def test_a_measured_entry_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(PATH.read_text())
    entry = {"decode_attention": {"num_warps": 8, "num_stages": 2}}
    for _ in range(2):
        tune_kernels.write(path, "some GPU", entry)
    entries = json.loads(path.read_text())
    assert entries == {**json.loads(PATH.read_text()), "some GPU": entry}
