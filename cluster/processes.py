"""Processes and their descendants, and the certainty that these are gone.

Ray's processes start others and are not always the last to end, so an instance that stops waits
for every descendant that it saw.
"""

import contextlib
import time
from collections.abc import Iterable

import psutil

_POLL_S = 0.05


def age_s() -> float:
    """Seconds since this process was started, its imports included."""
    return time.time() - psutil.Process().create_time()


def descendants() -> set[psutil.Process]:
    """All processes below this one."""
    return set(psutil.Process().children(recursive=True))


def tree(pid: int) -> set[psutil.Process]:
    """The process `pid` and all below it; empty when it is gone."""
    try:
        root = psutil.Process(pid)
        return {root, *root.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def is_alive(process: psutil.Process) -> bool:
    """Whether the very process still runs: not its pid's next owner, and not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> set[psutil.Process]:
    """Block until all have ended; returns those that have not after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    alive = {process for process in processes if is_alive(process)}
    while alive and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        alive = {process for process in alive if is_alive(process)}
    return alive


def kill(processes: Iterable[psutil.Process]) -> None:
    """Send SIGKILL to each that still runs."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
