"""One choice of a request inside a decode worker."""

from dataclasses import dataclass, field

from pagewire.decode_worker.drafting import Drafting
from pagewire.engine.batch import BatchRow
from pagewire.engine.page_pool import Reservation
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageKey
from pagewire.worker.identity import AttemptKey


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeSequence:
    """One choice of an attempt: its tokens and the pages that hold their KV.

    It has pages from the end of the hand-off on. Full pages of the prompt may be those of other
    choices too; what it writes is its own.
    """

    key: AttemptKey
    choice: int = 0
    route: pb.Route  # for events to the router that sent the request
    token_ids: tuple[int, ...]  # of the prompt, and of the output of an earlier attempt
    num_resumed: int = 0  # of them, the last ones: that output
    sampling: SamplingParams
    cache_salt: str = ""
    page_keys: tuple[PageKey, ...] = ()  # of the prompt's full pages; empty: nothing is shared
    priority: int  # lower runs first
    reservation: Reservation | None = None  # its part of the request's
    pages: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)  # of this attempt; begins with the Seal's token
    history: TokenHistory | None = None  # where `sampling` has penalties
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)  # not emitted yet, if asked
    num_emitted: int = 0  # output tokens that the router was told of
    drafting: Drafting | None = None  # where drafts may pay

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV exists once the next step has run, that of its drafts included."""
        num_drafts = self.drafting.num_drafts if self.drafting else 0
        return self.num_prompt_tokens + len(self.output) + num_drafts

    @property
    def num_output_tokens(self) -> int:
        """Output tokens up to now, those of an earlier attempt among them."""
        return self.num_resumed + len(self.output)

    @property
    def num_tokens_left(self) -> int:
        """Output tokens that it may have yet."""
        return self.sampling.max_tokens - self.num_output_tokens

    def next_row(self, follows: int | None = None) -> BatchRow:
        """Run the token sampled last and the drafts behind it, sample the next of each.

        `follows` is its row in the step that samples the last token just now.
        """
        drafts = self.drafting.token_ids if self.drafting else ()
        num_unread = int(follows is not None)
        return BatchRow(
            request_id=self.key.request_id,
            token_ids=(self.output[-1], *drafts),
            start=self.num_prompt_tokens + len(self.output) - 1 + num_unread,
            page_table=self.pages,
            sampling=self.sampling,
            output_position=self.num_output_tokens + num_unread,
            history=self.history,
            follows=follows,
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
