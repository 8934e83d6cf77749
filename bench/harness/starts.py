"""How long Pagewire takes to start: with its files on disk only, and with them in memory.

A cold start follows a request to the operating system to forget the files of the environment and
the model. It does not forget those that another process has mapped, so nothing else should run.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from peers.pagewire_server import PagewireServer
from peers.workspace import Workspace


def forget(folders: Iterable[Path]) -> None:
    """Ask the operating system to drop the cached content of all files below these folders."""
    for folder in folders:
        for path in folder.rglob("*") if folder.is_dir() else [folder]:
            if path.is_file() and not path.is_symlink():
                _forget_file(path)


def _forget_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


async def start_seconds(workspace: Workspace, *, launcher: str) -> float:
    """From the start of `pagewire serve` until its first answer to itself. Raises StartError."""
    async with PagewireServer(launcher=launcher).start(workspace) as running:
        return running.ready_s
