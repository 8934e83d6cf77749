"""The life of one request inside the router: a pure state machine.

    state       event                        → state       does
    ADMITTED    enqueue                        QUEUED
    QUEUED      a pair has room                PREFILLING   Attach to D
    PREFILLING  Attached                       PREFILLING   Prefill to P
    PREFILLING  FirstToken                     HANDOFF      delivers token 0
    PREFILLING  FirstToken, all finished       DONE         delivers token 0, Abort to both
    PREFILLING  Ready or Tokens                DECODING     delivers the tokens, token 0 among them
    HANDOFF     Ready or Tokens                DECODING     delivers the tokens
    DECODING    Tokens                         DECODING     delivers them
    DECODING    Tokens, all finished           DONE         delivers them
    DECODING    Failed by P, P lost            DECODING     nothing: D has all that it needs
    DECODING    Parked                         DECODING     Abort to P
    any live    Sealed                         the same     P's loss does no harm any more
    any live    Failed, deadline               FAILED       tells the client, Abort to the others
    any live    cancel                         CANCELLED    Abort to both
    any live    stop_choice                    the same     StopChoice to D; the last: as cancel

Where another try may go well a failure is not the end. Before DECODING, a hand-off fails with the
loss of D, when D says so (for a reason that may pass), and when P says so (Parked):

    PREFILLING, HANDOFF  it fails, P has the prompt   PARKED      Abort to D
    PARKED               there is another D           PREFILLING  Attach to it; HANDOFF if token 0
                                                                  is known
    PREFILLING, HANDOFF  Attached, P has the prompt   the same    Repoint to P
    PREFILLING, HANDOFF  D says that P is lost        PARKED      nothing: D holds the Reservation
    PARKED               Parked                       PARKED      Abort to D if it holds one
    PARKED               FirstToken                   PARKED      delivers token 0
    PARKED               a second passes              PARKED      RenewLease to P
    PREFILLING, HANDOFF  it fails, P knows nothing    RETRYING    Abort to both
    not DECODING         P says: not parked           RETRYING    Abort to D
    not DECODING         P lost before Sealed         RETRYING    nothing: D holds the Reservation
    DECODING             D lost                       RETRYING    Abort to P
    RETRYING             enqueue                      QUEUED

The attempt after the loss of P takes the Reservation over with its Attach. Where it goes to another
D, or the request ends, the D that holds it gets an Abort.

A retry of one choice continues behind the tokens that its client has; one of several begins anew,
and what is told again is not delivered.

A choice finishes with its finish_reason or when it is stopped; "all finished" is when none is left.

An event that does not carry the attempt that its sender was given and the incarnation of the worker
that was chosen for it, or comes when its choice or the request has ended, changes nothing.
"""

from dataclasses import dataclass
from enum import Enum, auto

from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import PageDemand
from pagewire.router import commands
from pagewire.router.cached_pages import NO_HASHES, PageHashes
from pagewire.router.commands import Assignment
from pagewire.router.request import FinishReason, Request, RequestFailed, TokenUpdate
from pagewire.router.time_ledger import Part, worker_times
from pagewire.router.token_log import TokenConflict, TokenGap, TokenLog


class State(Enum):
    ADMITTED = auto()
    QUEUED = auto()
    PREFILLING = auto()
    HANDOFF = auto()
    PARKED = auto()
    DECODING = auto()
    RETRYING = auto()
    DONE = auto()
    CANCELLED = auto()
    FAILED = auto()


TERMINAL = frozenset({State.DONE, State.CANCELLED, State.FAILED})

_HANDOFF_PARTS = frozenset({Part.GRANT_WAIT, Part.GATHER, Part.WIRE, Part.SCATTER})

# Why a decode worker may fail a hand-off that goes well at another try.
_PASSING = frozenset(
    {
        pb.FAILURE_CODE_PEER_LOST,
        pb.FAILURE_CODE_STALLED,
        pb.FAILURE_CODE_INTEGRITY,
        pb.FAILURE_CODE_FULL,
    }
)

_FULL_PAUSE_S = 1.0  # until a decode worker that was full is asked again
_RENEW_S = 1.0  # between two words to a prefill worker that its prompt is still wanted


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldReservation:
    """What a decode worker was promised to an attempt that has lost its prefill worker."""

    decode: bytes  # incarnation
    attempt: int


class Lifecycle:
    """One request. The methods return what is to be done."""

    def __init__(
        self, request: Request, router: bytes, page_hashes: PageHashes = NO_HASHES
    ) -> None:
        """`page_hashes` are those of the prompt's full pages, for the choice of workers."""
        self.request = request
        self.page_hashes = page_hashes
        self.state = State.ADMITTED
        self.assignment: Assignment | None = None  # of the attempt that goes on
        self.decode: bytes | None = None  # the decode worker that it counts on, if there is one
        self.held: HeldReservation | None = None  # that the next attempt may take over
        self.num_attempts = 0
        self.num_refused = 0  # of them, those that found a decode worker full
        self.num_dispatches = 0  # attempts that began with the prompt, not with a Repoint
        self.failed_decodes: set[bytes] = set()  # decode workers to which a hand-off has failed
        self.repeat_at = 0.0  # seconds on the router's clock, when these may be asked again
        self._renewed_at = 0.0  # likewise, when its prefill worker was last told to keep the prompt
        self.error: RequestFailed | None = None  # why it is PARKED or RETRYING
        self.queue_deadline = request.queue_deadline  # seconds on the router's clock
        self.logs = tuple(TokenLog() for _ in range(request.n))  # by choice
        self._router = router
        self._output: tuple[int, ...] = ()  # that the client had when the attempt was dispatched
        self._held_attempt: int | None = None  # under which the prefill worker has the prompt
        self._has_first_token = False  # of the prefill worker
        self._unfinished = set(range(request.n))  # choices
        self._is_sealed = False  # from then on the decode worker answers for the attempt
        self.arrived_at = 0.0  # seconds on the router's clock
        self.has_aged = False  # waited for so long that it goes before everybody younger
        self._enqueued_at = 0.0  # likewise
        self._times: dict[Part, float] = {}  # seconds, not delivered yet
        self._reported: set[Part] = set()  # by the workers

    @property
    def is_live(self) -> bool:
        return self.state not in TERMINAL

    def counts_on(self, worker: bytes) -> bool:
        """Whether it concerns this request when `worker`, an incarnation, is lost."""
        assigned = self.assignment
        is_assigned = assigned is not None and worker in (assigned.prefill, assigned.decode)
        return is_assigned or (self.held is not None and self.held.decode == worker)

    @property
    def awaits_first_token(self) -> bool:
        """Whether the prefill worker may still have tokens of the prompt to compute."""
        waiting = (State.PREFILLING, State.HANDOFF, State.PARKED)
        return self.state in waiting and not self._has_first_token

    @property
    def page_demand(self) -> PageDemand:
        """What the next attempt needs at most."""
        num_told = len(self._told())
        return PageDemand(
            num_prompt_tokens=len(self.request.token_ids) + num_told,
            max_tokens=self.request.sampling.max_tokens - num_told,
            n=self.request.n,
        )

    def enqueue(self, now: float) -> None:
        """Wait for a pair: for the first time, or again and for as long."""
        if self.state is State.RETRYING:
            self.queue_deadline = now + self.request.queue_deadline - self.arrived_at
        else:
            assert self.state is State.ADMITTED, f"enqueued while {self.state.name}"
            self.arrived_at = now
        self.state = State.QUEUED
        self._enqueued_at = now

    def age(self, now: float) -> None:
        """Look how much of its time in the queue is over: from half of it on it has aged."""
        assert self.state is State.QUEUED, f"ages while {self.state.name}"
        if now - self._enqueued_at >= self.queue_deadline - now:
            self.has_aged = True

    def dispatch(self, assignment: Assignment) -> list[Effect]:
        """A pair has room: the decode worker learns of the hand-off first."""
        assert self.state is State.QUEUED, f"dispatched while {self.state.name}"
        self.state = State.PREFILLING
        self.num_dispatches += 1
        self._output = self._told()
        self._has_first_token = False
        self._reported.clear()
        return self._attach(assignment)

    def repoint(self, assignment: Assignment) -> list[Effect]:
        """There is another decode worker for what the prefill worker has parked."""
        assert self.state is State.PARKED, f"repointed while {self.state.name}"
        self.state = State.HANDOFF if self._has_first_token else State.PREFILLING
        self._reported -= _HANDOFF_PARTS
        return self._attach(assignment)

    def renew_lease(self, now: float) -> list[Effect]:
        """It stays PARKED: whoever has the prompt shall keep it."""
        assert self.state is State.PARKED and self.assignment is not None
        if now - self._renewed_at < _RENEW_S:
            return []
        self._renewed_at = now
        route = self._prefill_route(self.assignment)
        return [SendCommand(command=pb.WorkerCommand(route=route, renew_lease=pb.RenewLease()))]

    def on_event(self, event: pb.WorkerEvent, now: float) -> list[Effect]:
        """An event of a worker, addressed to this request."""
        assigned = self.assignment
        if not self.is_live or assigned is None:
            return []
        sender, attempt = event.route.sender, event.route.attempt
        is_prefill = sender == assigned.prefill and attempt == self._held_attempt
        is_handing_off = is_prefill and attempt == assigned.attempt
        is_decode = sender == self.decode and attempt == assigned.attempt
        match event.WhichOneof("body"):
            case "attached" if is_decode:
                return self._on_attached(assigned, now)
            case "first_token" if is_prefill:
                return self._on_first_token(event.first_token)
            case "sealed" if is_handing_off and self.state is not State.PARKED:
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
                self.state = State.DECODING
                return self._on_tokens(
                    tokens.choice,
                    tokens.position,
                    tuple(tokens.token_ids),
                    tuple(tokens.logprobs),
                    tokens.finish_reason,
                )
            case "parked" if is_handing_off:
                return self._on_parked(assigned, event.parked, now)
            case "failed" if is_decode:
                return self._on_decode_failed(event.failed, now)
            case "failed" if is_prefill and self.state is not State.DECODING:
                return self._on_prefill_failed(event.failed)
            case _:
                return []

    def on_worker_lost(self, incarnation: bytes) -> list[Effect]:
        """A worker's process is gone, or is believed to be."""
        if self.held is not None and self.held.decode == incarnation:
            self.held = None
        if not self.is_live or self.assignment is None:
            return []
        if incarnation == self.decode:
            return self._fail_handoff(_worker_lost(), gone=incarnation)
        if incarnation != self.assignment.prefill:
            return []
        if self.state is State.DECODING or self._is_sealed:
            self._held_attempt = None
            return []
        if self.decode is not None:
            self.held = HeldReservation(decode=self.decode, attempt=self.assignment.attempt)
            self.decode = None
        return self._retry(_worker_lost(), gone=incarnation)

    def cancel(self, reason: str) -> list[Effect]:
        """The client does not want more. Idempotent."""
        if not self.is_live:
            return []
        self.state = State.CANCELLED
        return [*self._aborts(reason), *self._drop_held(reason)]

    def stop_choice(self, choice: int) -> list[Effect]:
        """The client does not want more of one choice. Idempotent; the last cancels the request."""
        if not self.is_live or choice not in self._unfinished:
            return []
        self._unfinished.remove(choice)
        if not self._unfinished:
            return self.cancel("every choice was stopped")
        return [] if self.decode is None else [self._stop_choice(self.decode, choice)]

    def fail(self, error: RequestFailed, gone: bytes | None = None) -> list[Effect]:
        """End the request with an error; `gone` is the worker that need not be told. Idempotent."""
        if not self.is_live:
            return []
        self.state = State.FAILED
        return [
            *self._aborts(error.code, gone),
            *self._drop_held(error.code),
            Fail(request_id=self.request.request_id, error=error),
        ]

    # --- Hand-offs --------------------------------------------------------------------------------

    def _attach(self, assignment: Assignment) -> list[Effect]:
        """Choices that need no more tokens are stopped before they begin."""
        self.num_attempts = assignment.attempt
        self.assignment = assignment
        self.decode = assignment.decode
        self._is_sealed = False
        held_attempt = 0
        if self.held is not None and self.held.decode == assignment.decode:
            held_attempt, self.held = self.held.attempt, None
        aborts = self._drop_held("another decode worker was chosen")
        attach = commands.attach(self.request, assignment, self._output, held_attempt)
        route = self._route(assignment.decode, assignment.attempt)
        ended = sorted(set(range(self.request.n)) - self._unfinished)
        return [
            *aborts,
            SendCommand(command=pb.WorkerCommand(route=route, attach=attach)),
            *(self._stop_choice(assignment.decode, choice) for choice in ended),
        ]

    def _on_attached(self, assigned: Assignment, now: float) -> list[Effect]:
        held, self._held_attempt = self._held_attempt, assigned.attempt
        route = self._route(assigned.prefill, assigned.attempt)
        if held == assigned.attempt:
            return []
        if held is not None:
            repoint = commands.repoint(assigned, held)
            return [SendCommand(command=pb.WorkerCommand(route=route, repoint=repoint))]
        self._add_time(Part.QUEUE, now - self._enqueued_at)
        prefill = commands.prefill(self.request, assigned, self._output, now, self.arrived_at)
        return [SendCommand(command=pb.WorkerCommand(route=route, prefill=prefill))]

    def _on_parked(self, assigned: Assignment, parked: pb.Parked, now: float) -> list[Effect]:
        """The prefill worker says that a hand-off has failed, and keeps the pages."""
        if self.state is State.DECODING:
            return [self._abort_prefill(assigned, "the decode worker has the prompt")]
        if self.state is State.PARKED:  # the prefill worker lives, so there is nothing to wait for
            return self._drop_held("the prefill worker keeps the prompt")
        return self._on_refused(parked, now)

    def _on_decode_failed(self, failed: pb.Failed, now: float) -> list[Effect]:
        """Where it has lost the prefill worker, it holds what it has promised to this attempt."""
        assert self.assignment is not None and self.decode is not None, "it was told of the request"
        if self.state is State.DECODING or failed.code not in _PASSING:
            return self.fail(worker_failure(failed), gone=self.decode)
        held = HeldReservation(decode=self.decode, attempt=self.assignment.attempt)
        effects = self._on_refused(failed, now, gone=self.decode)
        if failed.code == pb.FAILURE_CODE_PEER_LOST:
            self.held = held
        return effects

    def _on_refused(
        self, failed: pb.Failed | pb.Parked, now: float, gone: bytes | None = None
    ) -> list[Effect]:
        """One of the workers says that the hand-off has failed, and why."""
        if failed.code == pb.FAILURE_CODE_FULL:
            self.num_refused += 1
            self.repeat_at = now + _FULL_PAUSE_S
        return self._fail_handoff(worker_failure(failed), gone)

    def _on_prefill_failed(self, failed: pb.Failed) -> list[Effect]:
        assert self.assignment is not None, "somebody was told of the request"
        error, gone = worker_failure(failed), self.assignment.prefill
        if failed.code == pb.FAILURE_CODE_NOT_PARKED:
            return self._retry(error, gone)
        return self.fail(error, gone)

    def _fail_handoff(self, error: RequestFailed, gone: bytes | None = None) -> list[Effect]:
        """The decode worker is of no more use. `gone`: it need not be told."""
        assert self.assignment is not None and self.decode is not None, "no hand-off is under way"
        self.failed_decodes.add(self.decode)
        if self.state is State.DECODING or self._held_attempt is None:
            return self._retry(error, gone)
        effects: list[Effect] = []
        if self.decode != gone:
            effects.append(self._abort_decode(self.assignment, error.code))
        self.state = State.PARKED
        self.error = error
        self.decode = None
        self._is_sealed = False
        return effects

    def _retry(self, error: RequestFailed, gone: bytes | None) -> list[Effect]:
        """Only a new attempt can help: no worker has what is needed to go on."""
        effects = self._aborts(error.code, gone)
        self.state = State.RETRYING
        self.error = error
        self.assignment = None
        self.decode = None
        self._held_attempt = None
        return effects

    # --- Tokens -----------------------------------------------------------------------------------

    def _told(self) -> tuple[int, ...]:
        """Output behind which another attempt can continue."""
        return tuple(self.logs[0].token_ids) if self.request.n == 1 else ()

    def _on_first_token(self, token: pb.FirstToken) -> list[Effect]:
        self._on_times(token.times)
        self._has_first_token = True
        if self.state is State.PREFILLING:
            self.state = State.HANDOFF
        return self._on_tokens(
            token.choice,
            token.position,
            (token.token_id,),
            (token.logprobs,) if token.HasField("logprobs") else (),
            token.finish_reason,
            num_cached_tokens=min(token.cached_tokens, len(self.request.token_ids)),
        )

    def _on_tokens(
        self,
        choice: int,
        position: int,
        token_ids: tuple[int, ...],
        logprobs: tuple[pb.TokenLogprobs, ...],
        reason: "pb.FinishReason.ValueType",
        num_cached_tokens: int = 0,
    ) -> list[Effect]:
        wants_logprobs = self.request.sampling.HasField("num_logprobs")
        num_logprobs = len(token_ids) if wants_logprobs else 0
        if choice >= self.request.n or len(logprobs) != num_logprobs:
            return self.fail(_stream_broken())
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
            effects += self._end_with_token_0() if self.state is not State.DECODING else []
            self.state = State.DONE
        return effects

    def _end_with_token_0(self) -> list[Effect]:
        """There is no hand-off. The decode worker does not know that, and the prefill worker not if
        it waits for a choice that was stopped.
        """
        reason = "finished at token 0"
        return [*self._aborts(reason), *self._drop_held(reason)]

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

    # --- Commands ---------------------------------------------------------------------------------

    def _drop_held(self, reason: str) -> list[Effect]:
        """Nobody will take over what a decode worker holds for this request."""
        if self.held is None:
            return []
        route = self._route(self.held.decode, self.held.attempt)
        self.held = None
        return [SendCommand(command=pb.WorkerCommand(route=route, abort=pb.Abort(reason=reason)))]

    def _aborts(self, reason: str, gone: bytes | None = None) -> list[Effect]:
        """To all that take part, but `gone`."""
        if self.assignment is None:
            return []
        effects: list[Effect] = []
        if self.assignment.prefill != gone:
            effects.append(self._abort_prefill(self.assignment, reason))
        if self.decode is not None and self.decode != gone:
            effects.append(self._abort_decode(self.assignment, reason))
        return effects

    def _abort_prefill(self, assigned: Assignment, reason: str) -> SendCommand:
        abort = pb.Abort(reason=reason)
        return SendCommand(
            command=pb.WorkerCommand(route=self._prefill_route(assigned), abort=abort)
        )

    def _abort_decode(self, assigned: Assignment, reason: str) -> SendCommand:
        route = self._route(assigned.decode, assigned.attempt)
        return SendCommand(command=pb.WorkerCommand(route=route, abort=pb.Abort(reason=reason)))

    def _stop_choice(self, decode: bytes, choice: int) -> SendCommand:
        route = self._route(decode, self.num_attempts)
        stop = pb.StopChoice(choice=choice)
        return SendCommand(command=pb.WorkerCommand(route=route, stop_choice=stop))

    def _prefill_route(self, assigned: Assignment) -> pb.Route:
        """To the prefill worker, by the attempt under which it has the prompt."""
        return self._route(assigned.prefill, self._held_attempt or assigned.attempt)

    def _route(self, worker: bytes, attempt: int) -> pb.Route:
        return pb.Route(
            request_id=self.request.request_id,
            attempt=attempt,
            sender=self._router,
            receiver=worker,
        )


def _worker_lost() -> RequestFailed:
    return RequestFailed(
        "a worker that served this request was lost; send the request again",
        status=503,
        kind="server_error",
        code="worker_lost",
        retry_after_s=1,
    )


def _stream_broken() -> RequestFailed:
    return RequestFailed(
        "the stream lost its place and was ended; send the request again",
        status=500,
        kind="server_error",
        code="stream_broken",
    )


def worker_failure(failed: pb.Failed | pb.Parked) -> RequestFailed:
    """What a worker's failure means for the client."""
    match failed.code:
        case pb.FAILURE_CODE_FULL:
            return RequestFailed(
                f"{failed.message}; retry later",
                status=503,
                kind="server_error",
                code="overloaded",
                retry_after_s=1,
            )
        case pb.FAILURE_CODE_PEER_LOST | pb.FAILURE_CODE_STALLED | pb.FAILURE_CODE_NOT_PARKED:
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
