"""The core board: cores follow those who work, and the dead hold none."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.worker.core_board import CoreBoard, create_board, num_threads_of


@given(st.sets(st.integers(0, 64), min_size=1), st.integers(1, 128))
def test_all_cores_are_used_and_none_twice(working: set[int], num_cores: int) -> None:
    shares = [num_threads_of(slot, list(working), num_cores) for slot in working]
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == max(num_cores, len(working))


def test_who_works_alone_has_all_cores(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    create_board(path, 2)
    with (
        CoreBoard(path, slot=0, num_cores=2) as prefill,
        CoreBoard(path, slot=1, num_cores=2) as decode,
    ):
        assert prefill.claim() == 2
        assert decode.claim() == 1
        assert prefill.claim() == 1
        prefill.release()
        assert decode.claim() == 2
        decode.release()
        assert prefill.claim() == 2


def test_a_worker_that_leaves_takes_its_claim_along(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    create_board(path, 2)
    with CoreBoard(path, slot=0, num_cores=4) as staying:
        with CoreBoard(path, slot=1, num_cores=4) as leaving:
            leaving.claim()
        assert staying.claim() == 4


def test_the_claim_of_a_dead_worker_is_void(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    create_board(path, 2)
    program = (
        "import os, sys; from pathlib import Path; "
        "from pagewire.worker.core_board import CoreBoard; "
        "CoreBoard(Path(sys.argv[1]), slot=1, num_cores=4).claim(); print(flush=True); input(); "
        "os._exit(1)"
    )
    with (
        CoreBoard(path, slot=0, num_cores=4) as board,
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other,
    ):
        assert other.stdout is not None
        assert other.stdout.readline()
        assert board.claim() == 2
        other.communicate(b"\n")
        assert board.claim() == 4


def test_a_slot_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    create_board(path, 2)
    with pytest.raises(ValueError, match="core_board_slot is 2"):
        CoreBoard(path, slot=2, num_cores=4)
