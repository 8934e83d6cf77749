"""The memory and the processor time of a process and all its descendants.

Memory is PSS (proportional set size): a page that n processes share counts 1/n in each, so the sum
over processes is what they really take.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """One process."""

    pid: int
    command: str
    pss_mb: float


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants; empty when it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(processes: Iterable[psutil.Process]) -> list[ProcessMemory]:
    """Those that still run, the largest first."""
    found = []
    for process in processes:
        try:
            command = " ".join(process.cmdline())[:120] or process.name()
            pss = process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended while the others were read
        found.append(ProcessMemory(pid=process.pid, command=command, pss_mb=pss / 1e6))
    return sorted(found, key=lambda each: -each.pss_mb)


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """User and system time that the processes have used so far."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it ended while the others were read
        total += times.user + times.system
    return total


def idle_cores(pid: int, seconds: float) -> float:
    """Cores that a process tree keeps busy while nobody asks it for anything. Blocks."""
    tree = process_tree(pid)
    before = cpu_seconds(tree)
    time.sleep(seconds)
    return (cpu_seconds(tree) - before) / seconds
