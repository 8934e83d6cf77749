"""A process that was tied to its parent ends with it, whatever state it is in."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

TIMEOUT_S = 30.0
# Once it is tied to its parent it stops itself, and says so through the parent.
CHILD = (
    "import os, signal; from pagewire.worker.parent_death import end_with_parent; "
    "end_with_parent(); os.kill(os.getpid(), signal.SIGSTOP)"
)
PARENT = (
    "import os, signal, subprocess, sys\n"
    f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}])\n"
    "os.waitpid(child.pid, os.WUNTRACED)\n"
    "print(child.pid, flush=True)\n"
    "signal.pause()"
)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels cannot")
def test_a_stopped_process_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.status() == psutil.STATUS_STOPPED
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([child], TIMEOUT_S)
    assert not alive
