"""A process that cleans up behind an instance which is killed: `python janitor.py DIRECTORY`.

Some of Ray's processes outlive it by more than a minute. This one notices the end of its parent by
that of its standard input, kills every process that has the instance's directory as its TMPDIR, and
removes the directory. A plain script: it must cost nothing while it waits, so it imports little.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_ATTEMPTS = 50  # processes that are just being started may be missed at the first look
_PAUSE_S = 0.1


def processes_of(directory: str) -> Iterator[int]:
    """Those of this user whose temporary files go to `directory`, this one excepted."""
    if not _PROC.is_dir():  # not Linux
        return
    variable = b"TMPDIR=" + os.fsencode(directory)
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:  # gone, or not ours
                continue
            if variable in environment.split(b"\0"):
                yield int(entry.name)


def clean_up(directory: str) -> None:
    """Kill until nothing is left to kill, then remove the directory."""
    for _ in range(_ATTEMPTS):
        left = list(processes_of(directory))
        if not left:
            break
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_PAUSE_S)
    shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    while os.read(sys.stdin.fileno(), 1):  # nobody writes any
        continue
    clean_up(sys.argv[1])


if __name__ == "__main__":
    main()
