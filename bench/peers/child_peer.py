"""An engine that is a library: it runs in a child process of its own environment."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.pipe_endpoint import open_child
from peers.peer import RunningPeer, Traits
from peers.workspace import ROOT, Workspace

START_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildPeer:
    """Implements `peers.peer.Peer`."""

    traits: Traits
    module: str  # of peers.children; its arguments are the model and the number of threads
    python: Callable[[Workspace], Path]
    model: Callable[[Workspace], Path]
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self, workspace: Workspace) -> str | None:
        return workspace.missing(self.python(workspace), self.model(workspace))

    @asynccontextmanager
    async def start(self, workspace: Workspace) -> AsyncIterator[RunningPeer]:
        async with open_child(
            self._command(workspace),
            log=workspace.log(self.traits.name),
            environment={"OMP_NUM_THREADS": str(self.threads), **self.environment},
            cwd=ROOT / "bench",
            timeout_s=START_TIMEOUT_S,
        ) as child:
            yield RunningPeer(endpoint=child.endpoint, pid=child.pid, ready_s=child.ready_s)

    def _command(self, workspace: Workspace) -> Sequence[str]:
        model = self.model(workspace)
        module = f"peers.children.{self.module}"
        return [str(self.python(workspace)), "-m", module, str(model), str(self.threads)]
