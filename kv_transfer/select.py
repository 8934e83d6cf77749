"""Which transports a worker starts, and which of them a pair of workers uses."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.transport import Handler, Transport, TransportError
from pagewire.kv_transfer.ucx import UcxTransport
from pagewire.kv_transfer.ucx_library import open_library, versions

PREFERENCE = ("local", "ucx", "tcp")  # best first


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
    """The transports that a worker configured with `kind` (auto, ucx or tcp) shall start.

    `host` is the address of this machine that peers connect to. Raises TransportError for an
    unknown kind, and for ucx when this machine has none.
    """
    if kind == "tcp":
        tcp = TcpTransport(incarnation=incarnation, handler=handler, host=host)
        return Choice(transports=(tcp,), explanation="KV frames go over tcp, as configured")
    if kind not in ("auto", "ucx"):
        raise TransportError(f"transport is {kind!r}; choose auto, ucx or tcp")
    found = probe()
    if not found.usable and kind == "ucx":
        raise TransportError(found.explanation)
    tcp = TcpTransport(incarnation=incarnation, handler=handler, host=host)
    if not found.usable:
        return Choice(
            transports=(tcp,),
            explanation=f"KV frames go over tcp, since UCX is not usable: {found.explanation}",
        )
    ucx = UcxTransport(incarnation=incarnation, handler=handler, host=host)
    if kind == "ucx":
        return Choice(transports=(ucx,), explanation=f"{found.explanation}, as configured")
    return Choice(
        transports=(ucx, tcp),
        explanation=f"{found.explanation}; KV frames go over tcp to workers without it",
    )


def choose(mine: Sequence[str], theirs: Sequence[str]) -> str:
    """The kind that two workers with these kinds use.

    Raises TransportError when they have none in common.
    """
    for kind in PREFERENCE:
        if kind in mine and kind in theirs:
            return kind
    raise TransportError(
        f"no transport in common: {', '.join(mine) or 'none'} here, "
        f"{', '.join(theirs) or 'none'} there; start both workers with transport=auto"
    )
