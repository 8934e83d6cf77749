"""How the workers of one machine share its cores: whoever works alone has all of them.

The board is a small file that all of them map, one number a worker: its process id while it has
steps to run, else 0. A worker writes its own number and reads the others before every step and
between the layers of a long one, so cores are oversubscribed for one layer or one short step at
most, when somebody wakes up in the middle of it.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_SLOT_BYTES = 8


def num_threads_of(slot: int, working: Sequence[int], num_cores: int) -> int:
    """Threads for the next step of the worker in `slot`, itself among the `working` slots.

    Equal shares, at least one each; cores that are left over go to the lowest slots. Pure.
    """
    share, left_over = divmod(num_cores, len(working))
    return max(1, share + (sorted(working).index(slot) < left_over))


def create_board(path: Path, num_workers: int) -> None:
    """Nobody works yet. Raises FileExistsError."""
    with path.open("xb") as file:
        file.write(bytes(num_workers * _SLOT_BYTES))


class CoreBoard:
    """One worker's view of the board, for use by one thread at a time. A context: it ends there."""

    def __init__(self, path: Path, *, slot: int, num_cores: int) -> None:
        """Raises OSError when there is no board, ValueError when it has no such slot."""
        with path.open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 0)
        # Aligned and of one machine word, so that nobody ever reads half a number.
        self._pids = memoryview(self._mapping).cast("q")
        if not 0 <= slot < len(self._pids):
            self.close()
            raise ValueError(f"core_board_slot is {slot}; {path} has no such slot")
        self._slot = slot
        self._num_cores = num_cores

    def __enter__(self) -> "CoreBoard":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
        self.close()

    def claim(self) -> int:
        """The number of threads for a step or layer that starts now."""
        # First of all: of two that start at once, each then sees the other.
        self._pids[self._slot] = os.getpid()
        working = [
            slot
            for slot, pid in enumerate(self._pids)
            if slot == self._slot or (pid and _is_alive(pid))
        ]
        return num_threads_of(self._slot, working, self._num_cores)

    def release(self) -> None:
        """There is no step to run: leave the cores to the others."""
        self._pids[self._slot] = 0

    def close(self) -> None:
        self._pids.release()
        self._mapping.close()


def _is_alive(pid: int) -> bool:
    """Whether a process exists: one that crashed did not take back its claim."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
