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
    the hand-off is committed or given up.
    """

    key: AttemptKey
    route: pb.Route  # for events to the router that sent the request
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    siblings: tuple[SamplingParams, ...] = ()  # of the other choices
    history: TokenHistory | None = None  # where `sampling` has penalties
    sender: Sender
    addresses: tuple[tuple[str, bytes], ...]  # transports of the decode worker
    page_keys: tuple[PageKey, ...] = ()  # of the prompt's full pages; empty: nothing is shared
    arrived: float  # seconds on the worker's clock, as is the deadline
    deadline: float  # when the router gives the request up
    priority: int  # lower runs first
    started: float = 0.0  # when the first chunk was scheduled, once it was
    pages: tuple[int, ...] = field(default=())
    num_cached: int = 0  # tokens whose KV was in the prefix cache
    num_computed: int = 0  # those among them

    @property
    def num_remaining(self) -> int:
        return len(self.token_ids) - self.num_computed
