"""What may go wrong in a run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageFaults:
    """Probabilities, for each message on an otherwise ordered and reliable way."""

    repeat: float = 0.0  # it arrives twice
    reorder: float = 0.0  # those behind it may overtake it
    corrupt: float = 0.0  # one byte of its payload changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How many faults of each kind strike while requests arrive, and how messages fare."""

    peer_messages: MessageFaults = MessageFaults()  # between workers
    session_messages: MessageFaults = MessageFaults()  # between router and worker
    step_failure: float = 0.0  # probability, for each step of a model
    worker_kills: int = 0  # a new incarnation starts a little later
    router_kills: int = 0  # likewise
    worker_stops: int = 0  # SIGSTOP, and SIGCONT a little later
    machine_pauses: int = 0  # every process stands still, and goes on a little later
    connection_losses: int = 0  # between two workers
    session_losses: int = 0  # between router and worker


NO_FAULTS = Faults()
