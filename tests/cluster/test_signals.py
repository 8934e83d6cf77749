"""The first signal asks a program to stop, the second forces it."""

import os
import signal
import subprocess
import sys

import pytest

TIMEOUT_S = 30

PROGRAM = """
import asyncio, subprocess, sys
from pagewire.cluster.signals import run_until_signal

async def work():
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    print(child.pid, flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        if sys.argv[1] == "hang":
            print("hanging", flush=True)
            await asyncio.Event().wait()
        child.kill()
        child.wait()
        print("clean", flush=True)

asyncio.run(run_until_signal(work()))
"""


def start(mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode], stdout=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_lets_the_work_clean_up(number: signal.Signals) -> None:
    with start("clean") as process:
        line(process)
        process.send_signal(number)
        assert line(process) == "clean"
        assert process.wait(TIMEOUT_S) == 0


def test_second_signal_kills_what_was_started() -> None:
    with start("hang") as process:
        child = int(line(process))
        process.send_signal(signal.SIGTERM)
        assert line(process) == "hanging"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 1
        # Standard output of the child is the pipe: it reads as ended once the child is dead.
        assert line(process) == ""
    with pytest.raises(ProcessLookupError):
        while True:
            os.kill(child, 0)


def start_ignoring(name: str) -> subprocess.Popen[str]:
    command = f"trap '' {name}; exec {sys.executable} -c \"$0\" clean"
    return subprocess.Popen(["bash", "-c", command, PROGRAM], stdout=subprocess.PIPE, text=True)


def test_hangup_that_is_ignored_stays_so() -> None:
    with start_ignoring("HUP") as process:
        line(process)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        assert line(process) == "clean"
        assert process.wait(TIMEOUT_S) == 0


def test_interrupt_is_heard_by_background_jobs_of_a_script() -> None:
    with start_ignoring("INT") as process:
        line(process)
        process.send_signal(signal.SIGINT)
        assert line(process) == "clean"
        assert process.wait(TIMEOUT_S) == 0
