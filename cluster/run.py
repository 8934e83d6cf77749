"""`pagewire serve` as a process: its event loop, its signals, its log."""

import asyncio
import logging

import uvloop
from rich.console import Console

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.serve import serve
from pagewire.cluster.signals import run_until_signal
from pagewire.cluster.terminal import Terminal


def run_server(config: ServeConfig) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises ClusterError."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    terminal = Terminal(Console())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_until_signal(serve(config, terminal)))
    terminal.say("stopped")
