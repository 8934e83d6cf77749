"""The janitor: what an instance leaves that cannot clean up itself, and nothing else."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pagewire.cluster import janitor

TIMEOUT_S = 30.0
READY = "import signal, sys; print(flush=True); signal.pause()"


@contextmanager
def process(temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that runs until it is killed, with its temporary files in a directory."""
    command = [sys.executable, "-S", "-c", READY]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as running:
        assert running.stdout is not None
        running.stdout.readline()
        try:
            yield running
        finally:
            running.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "pagewire-1-x"
    (path / "ray").mkdir(parents=True)
    return path


def test_the_end_of_the_parent_is_the_end_of_what_it_left(directory: Path) -> None:
    with ExitStack() as stack:
        left, stopped = (stack.enter_context(process(directory)) for _ in range(2))
        bystander = stack.enter_context(process(directory.parent))
        os.kill(stopped.pid, signal.SIGSTOP)
        command = [sys.executable, "-I", "-S", janitor.__file__, str(directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as cleaner:
            assert cleaner.poll() is None
            assert left.poll() is None
        assert cleaner.returncode == 0
        assert left.wait(TIMEOUT_S) == stopped.wait(TIMEOUT_S) == -signal.SIGKILL
        assert bystander.poll() is None
    assert not directory.exists()


def test_a_directory_that_nobody_uses_is_removed(directory: Path) -> None:
    janitor.clean_up(str(directory))
    assert not directory.exists()
    janitor.clean_up(str(directory))  # which is gone: nothing happens
