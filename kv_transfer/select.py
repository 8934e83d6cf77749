"""Which transports a worker starts, and which of them a pair of workers uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.exposure import LOOPBACK, is_loopback, require_protected
from pagewire.kv_transfer.gloo import GlooTransport
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.shared_memory import SharedMemoryError, require_shared_memory
from pagewire.kv_transfer.shm import ShmTransport
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.tls import Tls, TlsFiles
from pagewire.kv_transfer.transport import Handler, Transport, TransportError
from pagewire.kv_transfer.ucx import UcxTransport
from pagewire.kv_transfer.ucx_library import open_library, versions

KINDS = ("auto", "shm", "ucx", "gloo", "tcp")  # what a worker can be configured with
PREFERENCE = ("local", "shm", "ucx", "gloo", "tcp")  # best first


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxProbe:
    """What this machine has of UCX."""

    usable: bool
    ucxx_version: str | None
    ucx_version: str | None
    transports: tuple[str, ...]  # UCX's own: tcp, sysv, posix, rc_mlx5, …
    explanation: str  # one sentence; with the remedy when it is not usable


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The transports of one worker, not started yet."""

    transports: tuple[Transport, ...]  # best first
    explanation: str  # one sentence for the worker's log
    pairs: OneConnection  # what they call, in front of the worker's Handler


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to a peer."""

    transport: Transport
    address: bytes  # of the peer
    reason: str  # why this one and no better one


def probe() -> UcxProbe:
    """Try UCX out. Takes half a second the first time, when ucxx is imported."""
    ucxx_version = ucx_version = None
    try:
        ucxx_version, ucx_version = versions()
        found = open_library().transports
    except TransportError as error:
        return UcxProbe(
            usable=False,
            ucxx_version=ucxx_version,
            ucx_version=ucx_version,
            transports=(),
            explanation=str(error),
        )
    return UcxProbe(
        usable=True,
        ucxx_version=ucxx_version,
        ucx_version=ucx_version,
        transports=found,
        explanation=f"UCX {ucx_version} can use {', '.join(found)}",
    )


def create_transports(
    kind: str,
    incarnation: bytes,
    handler: Handler,
    host: str,
    *,
    tls: TlsFiles | None = None,
    is_private: bool = False,
) -> Choice:
    """The transports that a worker configured with `kind` (one of KINDS) shall start.

    `host` is the address of this machine that peers connect to. On one that is not loopback pages
    are encrypted with `tls`, unless the network `is_private`. Raises TransportError for an unknown
    kind, and with a remedy for one that this machine cannot use or that would be unprotected.
    """
    if kind not in KINDS:
        raise TransportError(f"transport is {kind!r}; choose one of {', '.join(KINDS)}")
    require_protected(kind, host, has_tls=tls is not None, is_private=is_private)
    worker = _Worker(
        incarnation=incarnation,
        pairs=OneConnection(handler),
        host=host,
        tls=None if tls is None else Tls(tls),
        may_be_plain=is_loopback(host) or is_private,
    )
    transports, explanation = _all_usable(worker) if kind == "auto" else _configured(kind, worker)
    worker.pairs.join(transports)
    return Choice(transports=tuple(transports), explanation=explanation, pairs=worker.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    """What transports are made for."""

    incarnation: bytes
    pairs: OneConnection
    host: str
    tls: Tls | None
    may_be_plain: bool  # what cannot encrypt may be used

    def shm(self) -> Transport:
        """On loopback: nobody else could share memory."""
        return ShmTransport(
            incarnation=self.incarnation, handler=self.pairs.lane("shm"), host=LOOPBACK
        )

    def ucx(self) -> Transport:
        return UcxTransport(
            incarnation=self.incarnation, handler=self.pairs.lane("ucx"), host=self.host
        )

    def gloo(self) -> Transport:
        return GlooTransport(
            incarnation=self.incarnation, handler=self.pairs.lane("gloo"), host=self.host
        )

    def tcp(self) -> Transport:
        return TcpTransport(
            incarnation=self.incarnation,
            handler=self.pairs.lane("tcp"),
            host=self.host,
            tls=self.tls,
        )

    @property
    def tcp_name(self) -> str:
        return "tcp" if self.tls is None else "tcp with TLS"


def _configured(kind: str, worker: _Worker) -> tuple[list[Transport], str]:
    """The one transport of this kind, and what to say about it."""
    match kind:
        case "shm":
            require_shared_memory()
            return [worker.shm()], "KV frames go through shared memory, as configured"
        case "ucx":
            found = probe()
            if not found.usable:
                raise TransportError(found.explanation)
            return [worker.ucx()], f"{found.explanation}, as configured"
        case "gloo":
            explanation = "KV frames go through torch.distributed over gloo, as configured"
            return [worker.gloo()], explanation
        case _:
            return [worker.tcp()], f"KV frames go over {worker.tcp_name}, as configured"


def _all_usable(worker: _Worker) -> tuple[list[Transport], str]:
    """Every transport that works here, best first: which one is used, each pair decides."""
    transports: list[Transport] = []
    try:
        require_shared_memory()
    except SharedMemoryError as error:
        on_this_machine = f"shm is not usable: {error}"
    else:
        transports.append(worker.shm())
        on_this_machine = "KV frames go through shared memory to workers of this machine"
    found = probe() if worker.may_be_plain else None
    if found is None:
        to_others = f"to others over {worker.tcp_name}, since UCX cannot encrypt"
    elif found.usable:
        transports.append(worker.ucx())
        to_others = f"{found.explanation}; over {worker.tcp_name} to workers without it"
    else:
        to_others = (
            f"to others over {worker.tcp_name}, since UCX is not usable: {found.explanation}"
        )
    transports.append(worker.tcp())
    return transports, f"{on_this_machine}; {to_others}"


def candidates(
    mine: Mapping[str, Transport], theirs: Sequence[tuple[str, bytes]]
) -> list[Candidate]:
    """The ways from this worker to one with the addresses `theirs` (kind, address), best first.

    Raises TransportError when there is none.
    """
    addresses = dict(theirs)
    passed: list[str] = []  # why better ones are not used
    found: list[Candidate] = []
    for kind in [kind for kind in PREFERENCE if kind in mine or kind in addresses]:
        obstacle = _obstacle(kind, mine, addresses)
        if obstacle is not None:
            passed.append(f"not {kind}: {obstacle}")
            continue
        reason = "; ".join(passed) or "the best that there is"
        found.append(Candidate(transport=mine[kind], address=addresses[kind], reason=reason))
        passed.append(f"not {kind}: no connection")
    if not found:
        raise TransportError(
            f"no transport to the peer ({'; '.join(passed)}); "
            "start both workers with transport=auto"
        )
    return found


def _obstacle(
    kind: str, mine: Mapping[str, Transport], addresses: Mapping[str, bytes]
) -> str | None:
    if kind not in mine:
        return "this worker has none"
    if kind not in addresses:
        return "the peer has none"
    return mine[kind].obstacle(addresses[kind])
