"""The router without its network and clock: (state, event, now) → effects.

It admits requests against projected load, queues what does not fit, sends attempts to pairs of
workers and drives every request's lifecycle. The shell (`pagewire.router.control`) carries the
effects out; the simulator drives the very same class.
"""

from bisect import insort_left, insort_right
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import PageDemand, max_context_tokens
from pagewire.proto.page_hash import PageHasher
from pagewire.router.cached_pages import NO_HASHES, PageHashes
from pagewire.router.commands import Assignment
from pagewire.router.lifecycle import Effect, Lifecycle, SendCommand, State
from pagewire.router.members import HEARTBEAT_S, Member, Members
from pagewire.router.policy import Pair, choose_pair, choose_successor
from pagewire.router.request import Request, RequestFailed
from pagewire.router.retry_budget import RetryBudget

MAX_DISPATCHES = 3  # of one request
MAX_ATTEMPTS = 8  # of one request, Repoints among them
_LIVE_STATES = (State.QUEUED, State.PREFILLING, State.HANDOFF, State.PARKED, State.DECODING)


class _Projection(NamedTuple):
    """What was sent to a worker, counted before it reports it."""

    worker: bytes  # incarnation
    amount: int  # pages of a decode worker, prompt tokens of a prefill worker


class DispatchCore:
    """All requests and workers of a router. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        *,
        incarnation: bytes,
        max_queued: int,
        make_ticket: Callable[[], bytes],
        page_secret: bytes | None = None,
    ) -> None:
        """`page_secret` is that of PageHasher.

        Without it prefix caches play no part in the choice of workers.
        """
        self.incarnation = incarnation
        self.members = Members()
        self._max_queued = max_queued
        self._make_ticket = make_ticket
        self._page_secret = page_secret
        self._live: dict[str, Lifecycle] = {}
        self._queue: list[Lifecycle] = []  # as `_rank` has it, then first come, first served
        self._parked: dict[str, Lifecycle] = {}  # in the order in which they wait
        self._promised: dict[str, _Projection] = {}  # pages, by request
        self._prefilling: dict[str, _Projection] = {}  # tokens that may not be computed yet
        self._budget = RetryBudget()
        self._ticked_at: float | None = None
        self._is_stopping = False
        self.retries = {"dispatch": 0, "repoint": 0}  # attempts that followed a failure
        self.num_dropped = 0  # events addressed to no live request

    # --- Clients ----------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> list[Effect]:
        """Admit a request. Raises RequestFailed when there is no room, or never will be."""
        self.check_ready()
        if not self._fits(request.page_demand):
            raise _too_large(request)
        if len(self._queue) >= self._max_queued:
            raise RequestFailed(
                f"all workers are busy and {len(self._queue)} requests wait already; retry later",
                status=503,
                kind="server_error",
                code="overloaded",
                retry_after_s=1,
            )
        lifecycle = Lifecycle(request, self.incarnation, self._page_hashes(request))
        lifecycle.enqueue(now)
        self._live[request.request_id] = lifecycle
        self._budget.deposit()
        insort_right(self._queue, lifecycle, key=_rank)
        return self._dispatch_waiting()

    def cancel(self, request_id: str, reason: str) -> list[Effect]:
        """The client is gone or has enough. Idempotent."""
        lifecycle = self._live.get(request_id)
        if lifecycle is None:
            return []
        return self._after(lifecycle, lifecycle.cancel(reason))

    def stop_choice(self, request_id: str, choice: int) -> list[Effect]:
        """The client has enough of one choice. Idempotent."""
        lifecycle = self._live.get(request_id)
        if lifecycle is None:
            return []
        return self._after(lifecycle, lifecycle.stop_choice(choice))

    def refuse_all(self) -> list[Effect]:
        """The router is about to stop: fail every request, take no more. Idempotent."""
        self._is_stopping = True
        return [
            effect
            for lifecycle in list(self._live.values())
            for effect in self._after(lifecycle, lifecycle.fail(_stopping()))
        ]

    def check_ready(self) -> None:
        """Raise RequestFailed that says what is missing, unless a request could start now."""
        if self._is_stopping:
            raise _stopping()
        for role, name in ((pb.ROLE_PREFILL, "prefill"), (pb.ROLE_DECODE, "decode")):
            if not self.members.of_role(role):
                raise RequestFailed(
                    f"no {name} worker is ready; retry in a few seconds",
                    status=503,
                    kind="server_error",
                    code="no_workers",
                    retry_after_s=5,
                )

    def max_kv_tokens(self, *, num_prompt_tokens: int = 0, n: int = 1) -> int:
        """Tokens, prompt plus output, that the largest decode worker can hold; 0 without any.

        With `n` choices that share a prompt of `num_prompt_tokens`: tokens of each choice.
        """
        return max(
            (
                max_context_tokens(
                    num_pages=member.info.num_pages,
                    page_size=member.page_size,
                    num_prompt_tokens=num_prompt_tokens,
                    n=n,
                )
                for member in self.members.of_role(pb.ROLE_DECODE)
            ),
            default=0,
        )

    def counts(self) -> dict[str, int]:
        """Live requests by state."""
        states = Counter(lifecycle.state for lifecycle in self._live.values())
        return {state.name.lower(): states[state] for state in _LIVE_STATES}

    # --- Workers ----------------------------------------------------------------------------------

    def on_registered(self, info: pb.RegisterRequest, now: float) -> list[Effect]:
        """Take a worker in; one of the same name is replaced. Raises RegistrationRefused."""
        self.members.check(info)
        previous = self.members.named(info.name)
        effects = self.on_worker_lost(previous.incarnation, now) if previous else []
        self.members.add(info, now)
        return [*effects, *self._dispatch_waiting()]

    def on_worker_lost(self, incarnation: bytes, now: float) -> list[Effect]:
        """A worker is gone: what it did is tried again elsewhere. Idempotent.

        Such retries are not held against the budget: a worker can be lost only once.
        """
        if self.members.remove(incarnation) is None:
            return []
        effects: list[Effect] = []
        for lifecycle in list(self._live.values()):
            if not lifecycle.counts_on(incarnation):
                continue
            lost = lifecycle.on_worker_lost(incarnation)
            if lifecycle.state is State.RETRYING:
                lost += self._retry(lifecycle, now)
            effects += self._after(lifecycle, lost)
        return effects

    def on_event(self, event: pb.WorkerEvent, now: float) -> list[Effect]:
        """An event of a worker's session."""
        member = self.members.get(event.route.sender)
        if member is None or event.route.receiver != self.incarnation:
            self.num_dropped += 1
            return []
        member.last_seen = now
        if event.HasField("heartbeat"):
            could_start = member.may_start_prompts
            member.state = event.heartbeat
            return [] if could_start else self._dispatch_waiting()
        if event.HasField("kv_delta"):
            return [] if member.cached_pages.apply(event.kv_delta) else [self._ask_snapshot(member)]
        lifecycle = self._live.get(event.route.request_id)
        if lifecycle is None:
            self.num_dropped += 1
            return [self._release(event.route)] if event.HasField("parked") else []
        had_no_decode = lifecycle.state is State.PARKED
        effects = lifecycle.on_event(event, now)
        if lifecycle.state is State.RETRYING:
            may_retry = had_no_decode or self._budget.withdraw()
            effects += self._retry(lifecycle, now) if may_retry else _give_up(lifecycle)
        return self._after(lifecycle, effects)

    # --- Time -------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Fail what is past its deadline; give up workers that have gone silent."""
        effects: list[Effect] = []
        pause = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        if pause > HEARTBEAT_S:  # this process stood still: heartbeats wait to be read
            self.members.forgive(pause, now)
        for member in self.members.silent(now):
            effects += self.on_worker_lost(member.incarnation, now)
        for lifecycle in list(self._live.values()):
            request = lifecycle.request
            if now > request.deadline:
                effects += self._after(lifecycle, lifecycle.fail(_timed_out("the request")))
            elif lifecycle.state is State.QUEUED and now > lifecycle.queue_deadline:
                error = lifecycle.error or _timed_out("waiting for room")
                effects += self._after(lifecycle, lifecycle.fail(error))
        self._age_queued(now)
        return [*effects, *self._repeat_parked(now)]

    # --- Shared -----------------------------------------------------------------------------------

    def _retry(self, lifecycle: Lifecycle, now: float) -> list[Effect]:
        """Queue a request again, before those of its priority that came later."""
        if lifecycle.num_dispatches >= MAX_DISPATCHES:
            return _give_up(lifecycle)
        lifecycle.enqueue(now)
        self.retries["dispatch"] += 1
        insort_left(self._queue, lifecycle, key=_rank)
        return []

    def _age_queued(self, now: float) -> None:
        """So nobody starves: whoever has aged waits only for those that came before it."""
        for lifecycle in self._queue:
            lifecycle.age(now)
        self._queue.sort(key=_rank)

    def _release(self, route: pb.Route) -> SendCommand:
        """To a prefill worker that parks the prompt of a request which is over."""
        return SendCommand(
            command=pb.WorkerCommand(
                route=pb.Route(
                    request_id=route.request_id,
                    attempt=route.attempt,
                    sender=self.incarnation,
                    receiver=route.sender,
                ),
                abort=pb.Abort(reason="the request is over"),
            )
        )

    def _dispatch_waiting(self) -> list[Effect]:
        """Fill the room there is: what is parked holds memory, so it goes first."""
        if self._is_stopping:
            return []
        return [*self._repoint_parked(), *self._dispatch_queued()]

    def _repoint_parked(self) -> list[Effect]:
        """Send what is parked to decode workers that have not failed it already.

        What finds none waits until one comes or it is repeated; its lease at the prefill worker is
        renewed meanwhile. So does what a decode worker holds a Reservation for: in all likelihood
        the prefill worker is about to be found lost, and the Reservation is for its successor.
        """
        effects: list[Effect] = []
        for lifecycle in list(self._parked.values()):
            if lifecycle.held is None:
                effects += self._repoint_if_possible(lifecycle)
        return effects

    def _repeat_parked(self, now: float) -> list[Effect]:
        """Send what is still parked to any decode worker; those that have failed it come last.

        Were they lost, this would be known by now. One that was full may have room.
        """
        effects: list[Effect] = []
        for lifecycle in list(self._parked.values()):
            if now < lifecycle.repeat_at:
                continue
            repointed = self._repoint_if_possible(lifecycle)
            if not repointed:
                lifecycle.failed_decodes.clear()
                repointed = self._repoint_if_possible(lifecycle)
            effects += repointed or lifecycle.renew_lease(now)
        return effects

    def _repoint_if_possible(self, lifecycle: Lifecycle) -> list[Effect]:
        """To a decode worker that has not failed it; nothing without one."""
        assert lifecycle.assignment is not None, "what is parked is parked at a worker"
        decode = choose_successor(
            self.members.of_role(pb.ROLE_DECODE),
            demand=lifecycle.page_demand,
            page_hashes=lifecycle.page_hashes,
            avoided=lifecycle.failed_decodes,
        )
        if decode is None:
            return []
        del self._parked[lifecycle.request.request_id]
        self.retries["repoint"] += 1
        return lifecycle.repoint(self._assign(lifecycle, lifecycle.assignment.prefill, decode))

    def _dispatch_queued(self) -> list[Effect]:
        """Send queued requests out, in the order of the queue, while a pair has room.

        One that no worker could hold at the moment, however idle, stands aside for those behind it.
        """
        effects: list[Effect] = []
        for lifecycle in list(self._queue):
            pair = self._choose_pair(lifecycle)
            if pair is not None:
                self._queue.remove(lifecycle)
                num_tokens = pair.num_uncached_tokens
                pair.prefill.num_projected_tokens += num_tokens
                projection = _Projection(pair.prefill.incarnation, num_tokens)
                self._prefilling[lifecycle.request.request_id] = projection
                assignment = self._assign(lifecycle, pair.prefill.incarnation, pair.decode)
                effects += lifecycle.dispatch(assignment)
            elif self._fits(lifecycle.page_demand):
                break
        return effects

    def _choose_pair(self, lifecycle: Lifecycle) -> Pair | None:
        """With the decode worker that holds a Reservation for it, which is counted already."""
        held = lifecycle.held
        return choose_pair(
            self.members.of_role(pb.ROLE_PREFILL),
            self.members.of_role(pb.ROLE_DECODE),
            demand=lifecycle.page_demand,
            page_hashes=lifecycle.page_hashes,
            reserved=None if held is None else self.members.get(held.decode),
        )

    def _page_hashes(self, request: Request) -> PageHashes:
        """For every page size that a worker has now; one that joins later counts as empty."""
        if self._page_secret is None:
            return NO_HASHES
        hashes: dict[int, tuple[bytes, ...]] = {}
        for page_size in {member.info.layout.page_size for member in self.members}:
            hasher = PageHasher(secret=self._page_secret, page_size=page_size)
            keys = hasher.keys(request.token_ids, request.cache_salt)
            hashes[page_size] = tuple(key.hash for key in keys)
        return hashes

    def _ask_snapshot(self, member: Member) -> SendCommand:
        route = pb.Route(sender=self.incarnation, receiver=member.incarnation)
        return SendCommand(command=pb.WorkerCommand(route=route, kv_snapshot=pb.KvSnapshot()))

    def _fits(self, demand: PageDemand) -> bool:
        """Whether the registered workers could hold a request if they were idle."""
        return any(
            member.num_pages(demand.num_prompt_tokens) <= member.info.num_pages
            for member in self.members.of_role(pb.ROLE_PREFILL)
        ) and any(
            demand.num_pages(member.page_size) <= member.info.num_pages
            for member in self.members.of_role(pb.ROLE_DECODE)
        )

    def _assign(self, lifecycle: Lifecycle, prefill: bytes, decode: Member) -> Assignment:
        self._settle_decode(lifecycle)  # of the attempt whose Reservation is held
        demand = lifecycle.page_demand.num_pages(decode.page_size)
        num_pages = min(demand, decode.num_unpromised_pages)  # for the rest it waits there
        decode.num_projected_pages += num_pages
        projection = _Projection(decode.incarnation, num_pages)
        self._promised[lifecycle.request.request_id] = projection
        return Assignment(
            attempt=lifecycle.num_attempts + 1,
            prefill=prefill,
            decode=decode.incarnation,
            transports=tuple((item.kind, item.address) for item in decode.info.transports),
            ticket=self._make_ticket(),
        )

    def _after(self, lifecycle: Lifecycle, effects: list[Effect]) -> list[Effect]:
        """Give back what a request no longer needs, and fill the room."""
        num_failed = lifecycle.num_attempts - lifecycle.num_refused
        if lifecycle.state is State.PARKED and num_failed >= MAX_ATTEMPTS:
            effects += _give_up(lifecycle)
        if not lifecycle.awaits_first_token:
            self._settle_prefill(lifecycle)
        if lifecycle.decode is not None and lifecycle.is_live:
            return effects
        if lifecycle.held is None:
            self._settle_decode(lifecycle)
        request_id = lifecycle.request.request_id
        if lifecycle.state is State.PARKED:
            self._parked.setdefault(request_id, lifecycle)
        else:
            self._parked.pop(request_id, None)
        if not lifecycle.is_live:
            self._live.pop(request_id, None)
            if lifecycle in self._queue:
                self._queue.remove(lifecycle)
        return [*effects, *self._dispatch_waiting()]

    def _settle_prefill(self, lifecycle: Lifecycle) -> None:
        projection = self._prefilling.pop(lifecycle.request.request_id, None)
        member = self.members.get(projection.worker) if projection else None
        if member is not None and projection is not None:
            member.num_projected_tokens -= projection.amount

    def _settle_decode(self, lifecycle: Lifecycle) -> None:
        projection = self._promised.pop(lifecycle.request.request_id, None)
        member = self.members.get(projection.worker) if projection else None
        if member is not None and projection is not None:
            member.num_projected_pages -= projection.amount


def _rank(lifecycle: Lifecycle) -> tuple[int, float]:
    """Aged requests by their arrival, then the others by priority."""
    return (0, lifecycle.arrived_at) if lifecycle.has_aged else (1, lifecycle.request.priority)


def _give_up(lifecycle: Lifecycle) -> list[Effect]:
    assert lifecycle.error is not None, "what is given up has failed"
    return lifecycle.fail(lifecycle.error)


def _too_large(request: Request) -> RequestFailed:
    remedy = "shorten the prompt or lower max_tokens"
    return RequestFailed(
        "the request needs more KV cache than any worker has; "
        + (remedy if request.n == 1 else f"lower n, which is {request.n}, {remedy}"),
        status=400,
        kind="invalid_request_error",
        code="context_length_exceeded",
        param="max_tokens" if request.n == 1 else "n",
    )


def _stopping() -> RequestFailed:
    return RequestFailed(
        "the server is stopping; send the request again",
        status=503,
        kind="server_error",
        code="stopping",
        retry_after_s=5,
    )


def _timed_out(what: str) -> RequestFailed:
    return RequestFailed(
        f"{what} took longer than the server allows; retry later",
        status=408,
        kind="timeout_error",
        code="timeout",
        retry_after_s=1,
    )
