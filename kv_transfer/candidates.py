"""Which transports may join a pair of workers, best first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.transport import Transport, TransportError

PREFERENCE = ("local", "shm", "ucx", "nccl", "gloo", "tcp")  # best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to a peer."""

    transport: Transport
    address: bytes  # of the peer
    reason: str  # why this one and no better one


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
