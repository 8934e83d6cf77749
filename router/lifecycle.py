"""The life of one request inside the router: a pure state machine.

    state       event                        → state       does
    ADMITTED    enqueue                        QUEUED
    QUEUED      a pair has room                PREFILLING   Attach to D
    PREFILLING  Attached                       PREFILLING   Prefill to P
    PREFILLING  FirstToken                     HANDOFF      delivers token 0
    PREFILLING  FirstToken, all finished       DONE         delivers token 0, Abort to D
    PREFILLING  Ready or Tokens                DECODING     delivers the tokens, token 0 among them
    HANDOFF     Ready or Tokens                DECODING     delivers the tokens
    DECODING    Tokens                         DECODING     delivers them
    DECODING    Tokens, all finished           DONE         delivers them
    DECODING    Failed by P, P lost            DECODING     nothing: D has all that it needs
    any live    Sealed                         the same     P's loss does no harm any more
    any live    Failed, worker lost, deadline  FAILED       tells the client, Abort to the others
    any live    cancel                         CANCELLED    Abort to both
    any live    stop_choice                    the same     StopChoice to D; the last: as cancel

A choice finishes with its finish_reason or when it is stopped; "all finished" is when none is left.

An event that does not carry the current attempt and the incarnation of the worker that was chosen
for it, or comes when its choice or the request has ended, changes nothing.
"""

from dataclasses import dataclass
from enum import Enum, auto

from pagewire.proto import worker_pb2 as pb
from pagewire.router.cached_pages import NO_HASHES, PageHashes
from pagewire.router.request import FinishReason, Request, RequestFailed, TokenUpdate
from pagewire.router.time_ledger import Part, worker_times
from pagewire.router.token_log import TokenConflict, TokenGap, TokenLog


class State(Enum):
    ADMITTED = auto()
    QUEUED = auto()
    PREFILLING = auto()
    HANDOFF = auto()
    DECODING = auto()
    DONE = auto()
    CANCELLED = auto()
    FAILED = auto()


TERMINAL = frozenset({State.DONE, State.CANCELLED, State.FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The pair that one attempt was sent to."""

    attempt: int
    prefill: bytes  # incarnation
    decode: bytes  # incarnation
    transports: tuple[tuple[str, bytes], ...]  # of the decode worker
    ticket: bytes  # 16 random bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SendCommand:
    """Send `command` down the session of the worker that `command.route.receiver` names."""

    command: pb.WorkerCommand


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """Give the client tokens."""

    request_id: str
    update: TokenUpdate
    is_last: bool  # no choice is left


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """Tell the client that its request has failed."""

    request_id: str
    error: RequestFailed


Effect = SendCommand | Deliver | Fail

_FINISH = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class Lifecycle:
    """One request. The methods return what is to be done."""

    def __init__(
        self, request: Request, router: bytes, page_hashes: PageHashes = NO_HASHES
    ) -> None:
        """`page_hashes` are those of the prompt's full pages, for the choice of workers."""
        self.request = request
        self.page_hashes = page_hashes
        self.state = State.ADMITTED
        self.assignment: Assignment | None = None
        self.logs = tuple(TokenLog() for _ in range(request.n))  # by choice
        self._router = router
        self._is_prefill_sent = False
        self._unfinished = set(range(request.n))  # choices
        self._is_sealed = False  # from then on the decode worker answers for the attempt
        self._enqueued_at = 0.0  # seconds on the router's clock
        self._times: dict[Part, float] = {}  # seconds, not delivered yet
        self._reported: set[Part] = set()  # by the workers

    @property
    def is_live(self) -> bool:
        return self.state not in TERMINAL

    def enqueue(self, now: float) -> None:
        assert self.state is State.ADMITTED, f"enqueued while {self.state.name}"
        self.state = State.QUEUED
        self._enqueued_at = now

    def dispatch(self, assignment: Assignment) -> list[Effect]:
        """A pair has room: the decode worker learns of the hand-off first."""
        assert self.state is State.QUEUED, f"dispatched while {self.state.name}"
        self.state = State.PREFILLING
        self.assignment = assignment
        attach = pb.Attach(
            token_ids=self.request.token_ids,
            sampling=self.request.sampling,
            ticket=assignment.ticket,
            prefill=assignment.prefill,
            priority=self.request.priority,
            cache_salt=self.request.cache_salt,
            n=self.request.n,
        )
        route = self._route(assignment.decode)
        return [SendCommand(command=pb.WorkerCommand(route=route, attach=attach))]

    def on_event(self, event: pb.WorkerEvent, now: float) -> list[Effect]:
        """An event of a worker, addressed to this request."""
        assigned = self.assignment
        if not self.is_live or assigned is None or event.route.attempt != assigned.attempt:
            return []
        is_prefill = event.route.sender == assigned.prefill
        is_decode = event.route.sender == assigned.decode
        match event.WhichOneof("body"):
            case "attached" if is_decode:
                return self._on_attached(assigned, now)
            case "first_token" if is_prefill:
                token = event.first_token
                self._on_times(token.times)
                logprobs = (token.logprobs,) if token.HasField("logprobs") else ()
                return self._on_tokens(
                    token.choice,
                    0,
                    (token.token_id,),
                    logprobs,
                    token.finish_reason,
                    State.HANDOFF,
                    num_cached_tokens=min(token.cached_tokens, len(self.request.token_ids)),
                )
            case "sealed" if is_prefill:
                self._on_times(event.sealed.times)
                self._is_sealed = True
                return []
            case "ready" if is_decode:
                self._on_times(event.ready.times)
                self.state = State.DECODING
                return []
            case "tokens" if is_decode:
                tokens = event.tokens
                self._on_times(tokens.times)
                return self._on_tokens(
                    tokens.choice,
                    tokens.position,
                    tuple(tokens.token_ids),
                    tuple(tokens.logprobs),
                    tokens.finish_reason,
                    State.DECODING,
                )
            case "failed" if is_decode or (is_prefill and self.state is not State.DECODING):
                return self.fail(worker_failure(event.failed), gone=event.route.sender)
            case _:
                return []

    def on_worker_lost(self, incarnation: bytes) -> list[Effect]:
        """A worker's process is gone, or is believed to be."""
        assigned = self.assignment
        if not self.is_live or assigned is None:
            return []
        if incarnation == assigned.decode or (
            incarnation == assigned.prefill
            and self.state is not State.DECODING
            and not self._is_sealed
        ):
            error = RequestFailed(
                "a worker that served this request was lost; send the request again",
                status=503,
                kind="server_error",
                code="worker_lost",
                retry_after_s=1,
            )
            return self.fail(error, gone=incarnation)
        return []

    def cancel(self, reason: str) -> list[Effect]:
        """The client does not want more. Idempotent."""
        if not self.is_live:
            return []
        self.state = State.CANCELLED
        return self._aborts(reason)

    def stop_choice(self, choice: int) -> list[Effect]:
        """The client does not want more of one choice. Idempotent; the last cancels the request."""
        if not self.is_live or choice not in self._unfinished:
            return []
        self._unfinished.remove(choice)
        if not self._unfinished:
            return self.cancel("every choice was stopped")
        assert self.assignment is not None, "a choice is stopped for what it has said"
        route = self._route(self.assignment.decode)
        stop = pb.StopChoice(choice=choice)
        return [SendCommand(command=pb.WorkerCommand(route=route, stop_choice=stop))]

    def fail(self, error: RequestFailed, gone: bytes | None = None) -> list[Effect]:
        """End the request with an error; `gone` is the worker that need not be told. Idempotent."""
        if not self.is_live:
            return []
        self.state = State.FAILED
        return [
            *self._aborts(error.code, gone),
            Fail(request_id=self.request.request_id, error=error),
        ]

    def _on_attached(self, assigned: Assignment, now: float) -> list[Effect]:
        if self._is_prefill_sent:
            return []
        self._is_prefill_sent = True
        self._add_time(Part.QUEUE, now - self._enqueued_at)
        prefill = pb.Prefill(
            token_ids=self.request.token_ids,
            sampling=self.request.sampling,
            ticket=assigned.ticket,
            decode=assigned.decode,
            transports=[
                pb.TransportAddress(kind=kind, address=address)
                for kind, address in assigned.transports
            ],
            priority=self.request.priority,
            seconds_left=self.request.deadline - now,
            cache_salt=self.request.cache_salt,
            n=self.request.n,
        )
        route = self._route(assigned.prefill)
        return [SendCommand(command=pb.WorkerCommand(route=route, prefill=prefill))]

    def _on_tokens(
        self,
        choice: int,
        position: int,
        token_ids: tuple[int, ...],
        logprobs: tuple[pb.TokenLogprobs, ...],
        reason: "pb.FinishReason.ValueType",
        state: State,
        num_cached_tokens: int = 0,
    ) -> list[Effect]:
        wants_logprobs = self.request.sampling.HasField("num_logprobs")
        num_logprobs = len(token_ids) if wants_logprobs else 0
        if choice >= self.request.n or len(logprobs) != num_logprobs:
            return self.fail(_stream_broken())
        if self.state is not State.DECODING:
            self.state = state
        if choice not in self._unfinished:
            return []
        log = self.logs[choice]
        try:
            new = log.append(position, token_ids)
        except (TokenGap, TokenConflict):
            return self.fail(_stream_broken())
        finish = _FINISH.get(reason)
        if finish:
            self._unfinished.remove(choice)
        effects: list[Effect] = []
        if new or finish or num_cached_tokens:
            update = TokenUpdate(
                choice=choice,
                position=len(log.token_ids) - len(new),
                token_ids=new,
                finish_reason=finish,
                logprobs=logprobs[len(token_ids) - len(new) :] if wants_logprobs else (),
                num_cached_tokens=num_cached_tokens,
                times=self._times,
            )
            self._times = {}
            is_last = not self._unfinished
            effects.append(
                Deliver(request_id=self.request.request_id, update=update, is_last=is_last)
            )
        if not self._unfinished:
            ended_on_prefill = self.state is State.HANDOFF
            self.state = State.DONE
            if ended_on_prefill and self.assignment is not None:
                effects.append(self._abort(self.assignment.decode, "finished at token 0"))
        return effects

    def _on_times(self, times: pb.TimeParts) -> None:
        """What a worker has measured. A part that was reported before adds nothing."""
        for part, seconds in worker_times(times).items():
            if part not in self._reported:
                self._reported.add(part)
                self._add_time(part, seconds)

    def _add_time(self, part: Part, seconds: float) -> None:
        """For the next update, from which parts that took no time are left out."""
        if seconds:
            self._times[part] = self._times.get(part, 0.0) + seconds

    def _aborts(self, reason: str, gone: bytes | None = None) -> list[Effect]:
        if self.assignment is None:
            return []
        return [
            self._abort(worker, reason)
            for worker in (self.assignment.prefill, self.assignment.decode)
            if worker != gone
        ]

    def _abort(self, worker: bytes, reason: str) -> SendCommand:
        return SendCommand(
            command=pb.WorkerCommand(route=self._route(worker), abort=pb.Abort(reason=reason))
        )

    def _route(self, worker: bytes) -> pb.Route:
        assert self.assignment is not None, "a route needs an attempt"
        return pb.Route(
            request_id=self.request.request_id,
            attempt=self.assignment.attempt,
            sender=self._router,
            receiver=worker,
        )


def _stream_broken() -> RequestFailed:
    return RequestFailed(
        "the stream lost its place and was ended; send the request again",
        status=500,
        kind="server_error",
        code="stream_broken",
    )


def worker_failure(failed: pb.Failed) -> RequestFailed:
    """What a worker's failure means for the client."""
    match failed.code:
        case pb.FAILURE_CODE_PEER_LOST | pb.FAILURE_CODE_STALLED:
            return RequestFailed(
                f"{failed.message}; send the request again",
                status=503,
                kind="server_error",
                code="worker_lost",
                retry_after_s=1,
            )
        case pb.FAILURE_CODE_INTEGRITY:
            return RequestFailed(
                failed.message, status=500, kind="server_error", code="handoff_corrupt"
            )
        case _:
            return RequestFailed(
                failed.message, status=500, kind="server_error", code="worker_error"
            )
