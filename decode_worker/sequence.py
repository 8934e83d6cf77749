"""A request inside a decode worker."""

from dataclasses import dataclass, field

from pagewire.decode_worker.drafting import Drafting
from pagewire.decode_worker.receiver import Receiver
from pagewire.decode_worker.slots import SlotHolder
from pagewire.engine.batch import BatchRow
from pagewire.engine.page_pool import Reservation
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageKey
from pagewire.worker.identity import AttemptKey


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeSequence:
    """One attempt: its hand-off, then its tokens and the pages that hold their KV."""

    key: AttemptKey
    route: pb.Route  # for events to the router that sent the request
    token_ids: tuple[int, ...]  # of the prompt
    sampling: SamplingParams
    receiver: Receiver
    cache_salt: str = ""
    page_keys: tuple[PageKey, ...] = ()  # of the prompt's full pages; empty: nothing is shared
    priority: int  # lower runs first
    reservation: Reservation | None = None  # from Open to the end
    pages: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)  # token 0 comes with the Seal
    history: TokenHistory | None = None  # where `sampling` has penalties
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)  # not emitted yet, if asked
    num_emitted: int = 0  # output tokens that the router was told of
    drafting: Drafting | None = None  # where drafts may pay

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def holder(self) -> SlotHolder:
        """What this sequence's slots are granted to."""
        return SlotHolder(self.key, self.receiver.id.receiver)

    @property
    def num_reserved_tokens(self) -> int:
        """KV slots for the longest life it can have; the last token's KV is never needed."""
        return self.num_prompt_tokens + self.sampling.max_tokens - 1

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV exists once the next step has run, that of its drafts included."""
        num_drafts = self.drafting.num_drafts if self.drafting else 0
        return self.num_prompt_tokens + len(self.output) + num_drafts

    @property
    def num_tokens_left(self) -> int:
        """Output tokens that it may have yet."""
        return self.sampling.max_tokens - len(self.output)

    def next_row(self) -> BatchRow:
        """Run the token sampled last and the drafts behind it, sample the next of each."""
        drafts = self.drafting.token_ids if self.drafting else ()
        return BatchRow(
            request_id=self.key.request_id,
            token_ids=(self.output[-1], *drafts),
            start=self.num_prompt_tokens + len(self.output) - 1,
            page_table=self.pages,
            sampling=self.sampling,
            output_position=len(self.output),
            history=self.history,
            num_drafts=len(drafts),
            draft_work=self.drafting.work if self.drafting else None,
        )

    def append(self, token_id: int) -> None:
        """`token_id` is the next token of the output."""
        self.output.append(token_id)
        if self.history is not None:
            self.history.append(token_id)
        if self.drafting is not None:
            self.drafting.extend(token_id)
