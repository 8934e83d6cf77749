"""A request inside the router, and the seam between the HTTP endpoints and the dispatcher."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import PageDemand
from pagewire.router.time_ledger import PartTimes


class FinishReason(StrEnum):
    """Why a stream ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asked, after validation and tokenization; immutable."""

    request_id: str  # made by the router
    token_ids: tuple[int, ...]
    sampling: pb.SamplingParams  # stop_token_ids include the end-of-sequence ids unless ignored
    queue_deadline: float  # seconds on the router's clock; still waiting then: failed
    deadline: float  # seconds on the router's clock; still running then: failed
    priority: int = 0  # lower runs first
    cache_salt: str = ""  # only requests with the same salt share cached pages
    n: int = 1  # choices

    @property
    def page_demand(self) -> PageDemand:
        """What the request needs on a decode worker at most."""
        return PageDemand(
            num_prompt_tokens=len(self.token_ids), max_tokens=self.sampling.max_tokens, n=self.n
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUpdate:
    """New tokens of one choice, contiguous with those before them; there may be none."""

    position: int  # of the first id, counted in output tokens
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # set on the last update of the choice
    logprobs: tuple[pb.TokenLogprobs, ...] = ()  # one for each id when asked for, else none
    num_cached_tokens: int = 0  # of the prompt; set on the update that token 0 brings
    choice: int = 0
    times: PartTimes = field(default_factory=dict)  # that the last update did not have


class RequestFailed(Exception):
    """The one error of a request, as its client shall see it."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
        details: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status  # HTTP status, when no byte of the response was sent yet
        self.kind = kind  # `type` of OpenAI's error object
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.details = dict(details or {})  # further members of the error object


class Stream(Protocol):
    """The tokens of one request."""

    def __aiter__(self) -> AsyncIterator[TokenUpdate]:
        """Updates until each choice had one with a finish_reason. Raises RequestFailed."""

    def stop_choice(self, choice: int) -> None:
        """Have no more generated for one choice, while others go on. Idempotent."""

    def cancel(self, reason: str) -> None:
        """Free everything that the request holds on every worker. Idempotent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One registered worker, for /admin/workers and /metrics."""

    name: str
    role: str  # prefill or decode
    pid: int
    incarnation: str  # hexadecimal
    device: str
    address: str
    is_responding: bool  # False: `state` is the last heartbeat's, not the present
    state: pb.WorkerState


class Dispatcher(Protocol):
    """What the endpoints need of the rest of the router."""

    def submit(self, request: Request) -> Stream:
        """Admit a request. Raises RequestFailed when it cannot be taken."""

    def check_ready(self) -> None:
        """Raise RequestFailed that says what is missing, unless a request could start now."""

    async def inspect(self) -> list[WorkerView]:
        """The workers with their state as of now, sorted by name."""

    def counts(self) -> Mapping[str, int]:
        """Requests by lifecycle state (queued, prefilling, handoff, decoding)."""

    def retries(self) -> Mapping[str, int]:
        """Attempts since the start that followed a failure, by kind (dispatch, repoint)."""

    def max_kv_tokens(self, *, num_prompt_tokens: int = 0, n: int = 1) -> int:
        """The longest prompt plus output that the registered workers can hold; 0 without any.

        With `n` choices that share a prompt of `num_prompt_tokens`: of each choice.
        """
