"""A request inside a prefill worker."""

from dataclasses import dataclass, field

from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.prefill_worker.sender import Sender
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageKey
from pagewire.worker.identity import AttemptKey


@dataclass(slots=True, kw_only=True, eq=False)
class PrefillSequence:
    """One attempt's prompt, how much of it is computed, and the pages that hold it.

    `pages` is empty until the first chunk is scheduled; the sequence owns them from then on, until
    the hand-off is committed or given up. When a hand-off fails at the other end the sequence is
    parked: it keeps its pages under a lease until a Repoint begins the next one.
    """

    key: AttemptKey
    route: pb.Route  # for events to the router that sent the request
    token_ids: tuple[int, ...]
    num_resumed: int = 0  # of them, the last ones: output of an earlier attempt
    sampling: SamplingParams
    siblings: tuple[SamplingParams, ...] = ()  # of the other choices
    history: TokenHistory | None = None  # where `sampling` has penalties
    sender: Sender
    addresses: tuple[tuple[str, bytes], ...]  # transports of the decode worker
    page_keys: tuple[PageKey, ...] = ()  # of the prompt's full pages; empty: nothing is shared
    arrived: float  # seconds on the worker's clock, as the next two are
    submitted: float  # when the router took the request in
    deadline: float  # when the router gives the request up
    priority: int  # lower runs first
    started: float | None = None  # when the first chunk was scheduled; None: not yet
    pages: tuple[int, ...] = field(default=())
    num_cached: int = 0  # tokens whose KV was in the prefix cache
    num_computed: int = 0  # those among them
    first_tokens: tuple[int, ...] = ()  # token 0 of each choice, once it is sampled
    first_logprobs: tuple[pb.TokenLogprobs, ...] = ()  # of each, where they were asked for
    lease_until: float | None = None  # seconds on the worker's clock; None: not parked

    @property
    def num_remaining(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_parked(self) -> bool:
        """Whether its pages wait under a lease for another decode worker."""
        return self.lease_until is not None

    @property
    def waits_for_decode(self) -> bool:
        """Whether a decode worker that takes it is all that its pages wait for."""
        return self.is_parked or bool(self.first_tokens and not self.sender.is_accepted)

    def repoint(
        self,
        *,
        key: AttemptKey,
        route: pb.Route,
        sender: Sender,
        addresses: tuple[tuple[str, bytes], ...],
    ) -> None:
        """Go on as another attempt, towards another decode worker, with the pages as they are."""
        self.key = key
        self.route = route
        self.sender = sender
        self.addresses = addresses
        self.lease_until = None
