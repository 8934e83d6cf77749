"""Pagewire as its users run it: router, one prefill and one decode worker, over HTTP.

Unless told otherwise, workers are child processes instead of Ray actors. Ray is never on the path
of a request, and a Ray cluster for each of several instances would slow all engines down.
"""

import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.http_endpoint import open_http_endpoint
from harness.process import free_port, running_process, wait_ready
from pagewire.engine.precision import default_dtype
from peers.peer import Interface, RunningPeer, Traits
from peers.workspace import ROOT, Workspace, pagewire_command, pagewire_environment

SERVED_MODEL = "bench"
START_TIMEOUT_S = 120
READY = "ready in"  # of the banner, after the server's own first prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PagewireServer:
    """Implements `peers.peer.Peer`."""

    variant: str | None = None  # behind "pagewire-" in the tables
    quantization: str | None = None
    launcher: str = "subprocess"
    options: Sequence[str] = ()  # further arguments of `pagewire serve`

    @property
    def traits(self) -> Traits:
        variant = self.variant or self.quantization
        return Traits(
            name="pagewire" if variant is None else f"pagewire-{variant}",
            weights=self.quantization or default_dtype("cpu"),
            interface=Interface.HTTP,
        )

    def missing(self, workspace: Workspace) -> str | None:
        if self.quantization is not None and not serve_has("--quantization"):
            return "`pagewire serve` has no --quantization"
        return None

    @asynccontextmanager
    async def start(self, workspace: Workspace) -> AsyncIterator[RunningPeer]:
        log = workspace.log(self.traits.name)
        url = f"http://127.0.0.1:{(port := free_port())}"
        async with (
            running_process(
                self._command(workspace.model, port),
                log=log,
                environment=pagewire_environment(),
                cwd=ROOT,
            ) as process,
            open_http_endpoint(url, SERVED_MODEL) as endpoint,
        ):

            async def is_ready() -> bool:
                return READY in log.read_text(encoding="utf-8")

            ready_s = await wait_ready(process, is_ready, log=log, timeout_s=START_TIMEOUT_S)
            yield RunningPeer(endpoint=endpoint, pid=process.pid, ready_s=ready_s, url=url)

    def _command(self, model: Path, port: int) -> list[str]:
        options = [str(model), "--served-model", SERVED_MODEL, "--port", str(port)]
        options += ["--dashboard-port", "0", "--launcher", self.launcher]
        if self.quantization is not None:
            options += ["--quantization", self.quantization]
        return pagewire_command("serve", *options, *self.options)


def serve_has(option: str) -> bool:
    """Whether this version of `pagewire serve` knows an option."""
    text = subprocess.run(
        pagewire_command("serve", "--help"),
        env={**os.environ, **pagewire_environment(), "COLUMNS": "200"},  # long names uncut
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return f"{option} " in text
