"""Ends a program's work on SIGINT, SIGTERM or SIGHUP: the first asks, the second forces."""

import asyncio
import os
import signal
from collections.abc import Coroutine

from pagewire.cluster import processes

_FORCED_EXIT_CODE = 1


async def run_until_signal(work: Coroutine[None, None, None]) -> None:
    """Run `work`, cancelled by the first signal; returns when it has cleaned up.

    A second signal kills all processes below this one and ends this one on the spot.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(work)
    is_stopping = False

    def on_signal() -> None:
        nonlocal is_stopping
        if is_stopping:
            processes.kill(processes.descendants())
            os._exit(_FORCED_EXIT_CODE)
        is_stopping = True
        task.cancel()

    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is how `nohup` works
        handled.append(signal.SIGHUP)
    for number in handled:
        loop.add_signal_handler(number, on_signal)
    try:
        await task
    except asyncio.CancelledError:
        if not is_stopping:
            raise
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
