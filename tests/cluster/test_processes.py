"""Descendants are found, awaited and killed."""

import os
import subprocess
import sys

import psutil

from pagewire.cluster import processes

FOREVER = [sys.executable, "-c", "import signal; signal.pause()"]
# Starts another process, tells its pid, and waits.
PARENT = (
    "import signal, subprocess, sys\n"
    f"print(subprocess.Popen({FOREVER!r}).pid, flush=True)\n"
    "signal.pause()"
)


def test_grandchildren_are_found_and_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        started = processes.descendants()
        assert {parent.pid, grandchild} <= {process.pid for process in started}
        alive = processes.wait_gone(started, timeout_s=0)
        assert {parent.pid, grandchild} <= {process.pid for process in alive}
        processes.kill(started)
        assert not processes.wait_gone(started, timeout_s=30)


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen(FOREVER) as child:
        process = psutil.Process(child.pid)
        assert processes.is_alive(process)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.status() == psutil.STATUS_ZOMBIE
        assert not processes.is_alive(process)
    assert not processes.is_alive(process)
    processes.kill({process})  # of a process that is gone: nothing happens


def test_age_counts_from_the_start_of_the_process() -> None:
    first = processes.age_s()
    assert 0 < first <= processes.age_s()
