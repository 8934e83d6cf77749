"""The seam between the benchmarks and the engines that are compared."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from harness.streams import Endpoint
from peers.workspace import Workspace


class Interface(StrEnum):
    """How prompts reach an engine. Only HTTP pays for a server; compare like with like."""

    HTTP = "HTTP"
    IN_PROCESS = "in process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What an engine is, for the tables, and what it can be asked for."""

    name: str
    weights: str  # a key of harness.machine.WEIGHT_BYTES
    interface: Interface
    max_streams: int | None = None  # it can serve at once; None: as many as there are
    batches_continuously: bool = True  # a request joins while others run
    reports_tokens: bool = True  # as they come; else all of them at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningPeer:
    """An engine that answers."""

    endpoint: Endpoint
    pid: int  # of its first process
    ready_s: float  # from its start
    url: str | None = None  # of an engine that is a server


class Peer(Protocol):
    """An engine that can be started on this machine."""

    @property
    def traits(self) -> Traits: ...

    def missing(self, workspace: Workspace) -> str | None:
        """Why it cannot run here, as a sentence with the remedy; None when it can."""

    def start(self, workspace: Workspace) -> AbstractAsyncContextManager[RunningPeer]:
        """Run it for the length of a block. Raises StartError."""
