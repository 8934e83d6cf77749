"""Runs a stage in a process of its own, and again where it did not come to its end.

An item that raises, hangs or takes its process with it is noted with what the process wrote, and
the next process goes on behind it: an error of CUDA leaves nothing usable in the one that had it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from gpu_stages.journal import Failed, Record, decode, encode, failed, unfinished
from gpu_stages.stages import Outcome, Stage

SHOWN_OF_ERROR = 300  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFiles:
    """Where a stage leaves what it measured, and what it said."""

    journal: Path
    log: Path

    @classmethod
    def of(cls, directory: Path, stage: str) -> "StageFiles":
        return cls(journal=directory / f"{stage}.jsonl", log=directory / f"{stage}.log")

    def records(self) -> list[Record]:
        if not self.journal.exists():
            return []
        return [decode(line) for line in self.journal.read_text(encoding="utf-8").splitlines()]

    def write(self, record: Record) -> None:
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(f"{encode(record)}\n")


def run_stage_in_processes(
    stage: Stage,
    seconds: float,
    files: StageFiles,
    command: Callable[[float], Sequence[str]],
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """What the stage measures within so many seconds.

    `command` starts it, given the seconds that are left, and writes into the journal.
    """
    end = clock() + seconds
    files.journal.unlink(missing_ok=True)
    files.log.unlink(missing_ok=True)
    while (left := end - clock()) > 0:
        failure = _run(stage, left, files, command(left))
        if failure is None:
            break
        files.write(failure)
        if failure.item == stage.name:  # not an item's: it would fail again
            break
    return Outcome.of(files.records())


def _run(stage: Stage, seconds: float, files: StageFiles, command: Sequence[str]) -> Failed | None:
    """One process; None where it did all that was left to do."""
    # Compilers and drivers write there, in whatever encoding.
    with files.log.open("a+", encoding="utf-8", errors="replace") as log:
        start = log.tell()
        status = _status(command, seconds, log)
        if status == 0:
            return None
        log.seek(start)
        said = log.read()
    item = unfinished(files.records()) or stage.name
    if status is None:
        return failed(item, f"the stage took longer than {stage.budget_s:.0f} s", said)
    last = said.strip().rpartition("\n")[2]
    reason = f"exit status {status}: {last[:SHOWN_OF_ERROR]}"
    return failed(item, reason, said)


def _status(command: Sequence[str], seconds: float, log: TextIO) -> int | None:
    """How a process ended; None: it did not. Whatever it has started is gone then, too."""
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
