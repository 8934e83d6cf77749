"""What a router tells the two workers of one attempt: the bodies of its commands.

An attempt may continue a stream: `output` is what its client has been told already. It stands at
the end of the token ids, so workers compute its KV with that of the prompt and sample what follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The pair that one attempt was sent to."""

    attempt: int
    prefill: bytes  # incarnation
    decode: bytes  # incarnation
    transports: tuple[tuple[str, bytes], ...]  # of the decode worker
    ticket: bytes  # 16 random bytes


def attach(
    request: Request, assignment: Assignment, output: Sequence[int], held_attempt: int
) -> pb.Attach:
    """For the decode worker, which learns of the hand-off first.

    `held_attempt` is the one whose Reservation it may hold; 0: none.
    """
    return pb.Attach(
        token_ids=(*request.token_ids, *output),
        num_output_tokens=len(output),
        sampling=request.sampling,
        ticket=assignment.ticket,
        prefill=assignment.prefill,
        priority=request.priority,
        cache_salt=request.cache_salt,
        n=request.n,
        held_attempt=held_attempt,
    )


def prefill(
    request: Request, assignment: Assignment, output: Sequence[int], now: float, arrived_at: float
) -> pb.Prefill:
    """For the prefill worker, once the decode worker expects it.

    `now`, and `arrived_at`, when the router took the request in, are seconds on the router's clock.
    """
    return pb.Prefill(
        token_ids=(*request.token_ids, *output),
        num_output_tokens=len(output),
        sampling=request.sampling,
        ticket=assignment.ticket,
        decode=assignment.decode,
        transports=_transports(assignment),
        priority=request.priority,
        seconds_left=request.deadline - now,
        age_s=now - arrived_at,
        cache_salt=request.cache_salt,
        n=request.n,
    )


def repoint(assignment: Assignment, held_attempt: int) -> pb.Repoint:
    """For the prefill worker that has the KV as `held_attempt`, once the decode worker is ready."""
    return pb.Repoint(
        held_attempt=held_attempt,
        ticket=assignment.ticket,
        decode=assignment.decode,
        transports=_transports(assignment),
    )


def _transports(assignment: Assignment) -> list[pb.TransportAddress]:
    return [
        pb.TransportAddress(kind=kind, address=address) for kind, address in assignment.transports
    ]
