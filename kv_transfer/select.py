"""Which transports a worker starts, and which of them a pair of workers uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.gloo import GlooTransport
from pagewire.kv_transfer.shared_memory import SharedMemoryError, require_shared_memory
from pagewire.kv_transfer.shm import ShmTransport
from pagewire.kv_transfer.tcp import TcpTransport
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


def create_transports(kind: str, incarnation: bytes, handler: Handler, host: str) -> Choice:
    """The transports that a worker configured with `kind` (one of KINDS) shall start.

    `host` is the address of this machine that peers connect to. Raises TransportError for an
    unknown kind, and with a remedy for one that this machine cannot use.
    """
    match kind:
        case "tcp":
            tcp = TcpTransport(incarnation=incarnation, handler=handler, host=host)
            return Choice(transports=(tcp,), explanation="KV frames go over tcp, as configured")
        case "shm":
            require_shared_memory()
            shm = ShmTransport(incarnation=incarnation, handler=handler, host=host)
            return Choice(
                transports=(shm,), explanation="KV frames go through shared memory, as configured"
            )
        case "ucx":
            found = probe()
            if not found.usable:
                raise TransportError(found.explanation)
            ucx = UcxTransport(incarnation=incarnation, handler=handler, host=host)
            return Choice(transports=(ucx,), explanation=f"{found.explanation}, as configured")
        case "gloo":
            gloo = GlooTransport(incarnation=incarnation, handler=handler, host=host)
            return Choice(
                transports=(gloo,),
                explanation="KV frames go through torch.distributed over gloo, as configured",
            )
        case "auto":
            return _all_usable(incarnation, handler, host)
    raise TransportError(f"transport is {kind!r}; choose one of {', '.join(KINDS)}")


def _all_usable(incarnation: bytes, handler: Handler, host: str) -> Choice:
    """Every transport that works here, best first: which one is used, each pair decides."""
    transports: list[Transport] = []
    try:
        require_shared_memory()
    except SharedMemoryError as error:
        on_this_machine = f"shm is not usable: {error}"
    else:
        transports.append(ShmTransport(incarnation=incarnation, handler=handler, host=host))
        on_this_machine = "KV frames go through shared memory to workers of this machine"
    found = probe()
    if found.usable:
        transports.append(UcxTransport(incarnation=incarnation, handler=handler, host=host))
        to_others = f"{found.explanation}; over tcp to workers without it"
    else:
        to_others = f"to others over tcp, since UCX is not usable: {found.explanation}"
    transports.append(TcpTransport(incarnation=incarnation, handler=handler, host=host))
    return Choice(transports=tuple(transports), explanation=f"{on_this_machine}; {to_others}")


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
