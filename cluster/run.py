"""`pagewire serve` as a process: its event loop, its signals, its log."""

import asyncio
import logging
import os

import uvloop
from rich.console import Console

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.signals import run_until_signal
from pagewire.cluster.terminal import Terminal

_GRPC_ENVIRONMENT = {
    # Processes are started only to run another program, for which gRPC has nothing to prepare.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # It would report every connection that a stopping worker closes.
    "GRPC_VERBOSITY": "ERROR",
}


def run_server(config: ServeConfig) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises ClusterError."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name, value in _GRPC_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from pagewire.cluster.serve import serve  # imports gRPC, which then reads the environment

    terminal = Terminal(Console())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_until_signal(serve(config, terminal)))
    terminal.say("stopped")
