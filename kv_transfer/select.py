"""Which transports a worker starts."""

from dataclasses import dataclass
from functools import partial

from pagewire.kv_transfer.device_memory import settle_gpu
from pagewire.kv_transfer.exposure import LOOPBACK, is_loopback, require_protected
from pagewire.kv_transfer.gloo import GlooTransport
from pagewire.kv_transfer.nccl import NcclTransport
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.shared_memory import SharedMemoryError, require_shared_memory
from pagewire.kv_transfer.shm import ShmTransport
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.tls import Tls, TlsFiles
from pagewire.kv_transfer.transport import Handler, Transport, TransportError
from pagewire.kv_transfer.ucx import UcxTransport
from pagewire.kv_transfer.ucx_library import open_library, versions

KINDS = ("auto", "shm", "ucx", "nccl", "gloo", "tcp")  # what a worker can be configured with


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
    device: str = "cpu",
    num_devices: int = 1,
) -> Choice:
    """The transports that a worker configured with `kind` (one of KINDS) shall start.

    `host` is the address of this machine that peers connect to. On one that is not loopback pages
    are encrypted with `tls`, unless the network `is_private`. The worker keeps them on `device`, or
    on so many from there on.
    Raises TransportError for an unknown kind, and with a remedy for one that this machine cannot
    use or that would be unprotected.
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
        device=device,
        num_devices=num_devices,
    )
    transports, explanation = _all_usable(worker) if kind == "auto" else _configured(kind, worker)
    if device != "cpu":
        explanation += f"; {worker.way_of_pages}"
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
    device: str
    num_devices: int

    @property
    def way_of_pages(self) -> str:
        """From and to GPUs."""
        if self.num_devices > 1:
            return f"pages of {self.num_devices} GPUs go through pinned host memory"
        return "pages go through pinned host memory, except over ucx where its line says so"

    def shm(self) -> Transport:
        """On loopback: nobody else could share memory."""
        return ShmTransport(
            incarnation=self.incarnation, handler=self.pairs.lane("shm"), host=LOOPBACK
        )

    def ucx(self) -> Transport:
        return UcxTransport(
            incarnation=self.incarnation,
            handler=self.pairs.lane("ucx"),
            host=self.host,
            settle_device=partial(settle_gpu, self.device) if self._is_on_one_gpu else None,
        )

    @property
    def _is_on_one_gpu(self) -> bool:
        return self.device != "cpu" and self.num_devices == 1

    def nccl(self) -> Transport:
        """Raises TransportError, with a remedy, where NCCL cannot be used."""
        from pagewire.kv_transfer.nccl_device import require_nccl  # imports torch, which is slow

        require_nccl(self.device)
        return NcclTransport(
            incarnation=self.incarnation,
            handler=self.pairs.lane("nccl"),
            host=self.host,
            device=self.device,
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
        case "nccl":
            return [worker.nccl()], "KV frames go from GPU to GPU over NCCL, as configured"
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
    to_others = f"to others over {worker.tcp_name}"
    if worker.may_be_plain:
        direct, why = _between_machines(worker)
        transports += direct
        to_others = f"{to_others}, or better: {why}" if direct else f"{to_others}: {why}"
    else:
        to_others = f"{to_others}: UCX cannot encrypt"
    transports.append(worker.tcp())
    return transports, f"{on_this_machine}; {to_others}"


def _between_machines(worker: _Worker) -> tuple[list[Transport], str]:
    """The transport that is better than tcp, and the reason; none and why there is none."""
    found = probe()
    if found.usable:
        return [worker.ucx()], found.explanation
    if worker.device == "cpu":
        return [], f"UCX is not usable: {found.explanation}"
    try:
        return [worker.nccl()], f"NCCL, since UCX is not usable: {found.explanation}"
    except TransportError as error:
        return [], f"UCX is not usable: {found.explanation}; and {error}"
