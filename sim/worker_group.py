"""Prefill workers and one decode worker under virtual time, and a router that does what it is told.

Where `World` lets routers decide, here every hand-off begins, ends and is given up at the word of
whoever drives the group. The books of its workers are checked after every event.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.page_pool import PagePool
from pagewire.engine.sampling_params import SamplingParams
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import KEY_BYTES, PageHasher
from pagewire.sim.costs import BALANCED, Costs
from pagewire.sim.decode import SimDecodeWorker
from pagewire.sim.environment import Environment
from pagewire.sim.faults import NO_FAULTS, Faults
from pagewire.sim.invariants import AnyWorker, check_worker
from pagewire.sim.kv_memory import LAYOUT
from pagewire.sim.model import VOCAB_SIZE, reference_tokens
from pagewire.sim.prefill import SimPrefillWorker
from pagewire.sim.process import Process
from pagewire.sim.session import Session
from pagewire.sim.timeline import Timeline
from pagewire.sim.transport import Fabric
from pagewire.sim.violation import require
from pagewire.sim.worker import TRANSPORT_KIND

NUM_PAGES = 20  # of each worker: few, so that they change hands all the time
NUM_SLOTS = 4
MAX_PROMPT_TOKENS = 96
MAX_OUTPUT_TOKENS = 12
_HASHER = PageHasher(secret=bytes(KEY_BYTES), page_size=LAYOUT.page_size)
_LOOK_S = 0.5  # between two looks whether all is over
_HANG_S = 60.0  # what is not over by then never will be


@dataclass(slots=True, kw_only=True)
class Handoff:
    """What the router knows of one request."""

    request_id: str
    prefill: SimPrefillWorker
    prompt: tuple[int, ...]
    max_tokens: int
    expected: list[int]  # tokens
    ticket: bytes
    heard: str = "nothing"  # the last event of either worker
    tokens: list[int] = field(default_factory=list)
    has_finished: bool = False
    is_aborted: bool = False


class WorkerGroup:
    """The workers, and the router's end of their sessions."""

    def __init__(
        self,
        seed: int,
        *,
        num_prefill: int = 1,
        faults: Faults = NO_FAULTS,
        costs: Costs = BALANCED,
    ) -> None:
        self.environment = Environment(
            timeline=Timeline(), random=Random(seed), costs=costs, faults=faults
        )
        self.random = self.environment.random
        self.fabric = Fabric()
        self.process = Process("router", self.environment, lambda process: None)
        self.incarnation = self.random.randbytes(16)
        self.handoffs: dict[str, Handoff] = {}
        self._sessions: dict[bytes, Session] = {}  # by incarnation of the worker
        self._checks: dict[Process, Callable[[], None]] = {}
        self.prefills = [self._make_prefill(f"prefill-{index}") for index in range(num_prefill)]
        self.decode = self._make_decode()

    @property
    def workers(self) -> "list[AnyWorker]":
        return [*self.prefills, self.decode]

    # --- What a router does -----------------------------------------------------------------------

    def hand_off(self) -> Handoff:
        """Begin the hand-off of a new prompt, from any of the prefill workers."""
        num_tokens = self.random.randint(1, MAX_PROMPT_TOKENS)
        prompt = tuple(self.random.randrange(VOCAB_SIZE) for _ in range(num_tokens))
        max_tokens = self.random.randint(2, MAX_OUTPUT_TOKENS)
        handoff = Handoff(
            request_id=f"request-{len(self.handoffs)}",
            prefill=self.random.choice(self.prefills),
            prompt=prompt,
            max_tokens=max_tokens,
            expected=reference_tokens(prompt, SamplingParams(max_tokens=max_tokens)),
            ticket=self.random.randbytes(16),
        )
        self.handoffs[handoff.request_id] = handoff
        attach = pb.Attach(
            token_ids=handoff.prompt,
            sampling=_sampling(handoff),
            ticket=handoff.ticket,
            prefill=handoff.prefill.incarnation,
        )
        self._command(self.decode, handoff, attach=attach)
        return handoff

    def abort(self, handoff: Handoff, worker: AnyWorker) -> None:
        """Tell one of the two workers to give the hand-off up."""
        handoff.is_aborted = True
        self._command(worker, handoff, abort=pb.Abort(reason="simulated"))

    def restart_decode(self) -> None:
        """The decode worker dies, and has a successor."""
        self.decode.kill()
        self.decode = self._make_decode()

    # --- Time -------------------------------------------------------------------------------------

    def run_for(self, seconds: float) -> None:
        timeline = self.environment.timeline
        timeline.run_until(timeline.now + seconds)

    def settle(self) -> None:
        """Let time pass until no worker has anything to do.

        Raises InvariantViolation when that does not come to an end.
        """
        horizon = self.environment.now + _HANG_S
        self.run_for(_LOOK_S)
        while not all(worker.core.is_idle for worker in self.workers):
            require(self.environment.now < horizon, "a hand-off never ends")
            self.run_for(_LOOK_S)

    # --- RouterEnd --------------------------------------------------------------------------------

    def on_event(self, session: Session, event: pb.WorkerEvent) -> None:
        """A worker says something; the tokens of a hand-off must be those of its prompt."""
        handoff = self.handoffs.get(event.route.request_id)
        if handoff is None:  # a heartbeat
            return
        name = event.WhichOneof("body") or ""
        handoff.heard = name
        match name:
            case "attached" if not handoff.is_aborted:
                self._start_prefill(handoff)
            case "failed" if not handoff.is_aborted:
                self.abort(handoff, handoff.prefill)
                self.abort(handoff, self.decode)
            case "tokens":
                self._on_tokens(handoff, event.tokens)

    def on_session_ended(self, session: Session) -> None:
        """A worker was restarted."""

    def _start_prefill(self, handoff: Handoff) -> None:
        prefill = pb.Prefill(
            token_ids=handoff.prompt,
            sampling=_sampling(handoff),
            ticket=handoff.ticket,
            decode=self.decode.incarnation,
            transports=[pb.TransportAddress(kind=TRANSPORT_KIND)],
        )
        self._command(handoff.prefill, handoff, prefill=prefill)

    def _on_tokens(self, handoff: Handoff, tokens: pb.Tokens) -> None:
        if tokens.position != len(handoff.tokens):  # a repetition
            return
        handoff.tokens += tokens.token_ids
        expected = handoff.expected[: len(handoff.tokens)]
        require(handoff.tokens == expected, f"{handoff.request_id} got a wrong token")
        handoff.has_finished = tokens.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    def _command(
        self,
        worker: AnyWorker,
        handoff: Handoff,
        *,
        attach: pb.Attach | None = None,
        prefill: pb.Prefill | None = None,
        abort: pb.Abort | None = None,
    ) -> None:
        route = pb.Route(
            request_id=handoff.request_id,
            attempt=1,
            sender=self.incarnation,
            receiver=worker.incarnation,
        )
        self._sessions[worker.incarnation].send(
            pb.WorkerCommand(route=route, attach=attach, prefill=prefill, abort=abort)
        )

    # --- The workers ------------------------------------------------------------------------------

    def _make_prefill(self, name: str) -> SimPrefillWorker:
        core = PrefillCore(
            incarnation=self.random.randbytes(16),
            layout=LAYOUT,
            pool=PagePool(NUM_PAGES),
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_PROMPT_TOKENS + MAX_OUTPUT_TOKENS,
            max_batch_tokens=64,
            slot_bytes=LAYOUT.page_bytes,
            hasher=_HASHER,
        )
        worker = SimPrefillWorker(
            process=Process(name, self.environment, self._observe),
            core=core,
            max_model_len=MAX_PROMPT_TOKENS + MAX_OUTPUT_TOKENS,
            fabric=self.fabric,
            routers=(),
        )
        self._join(worker)
        return worker

    def _make_decode(self) -> SimDecodeWorker:
        core = DecodeCore(
            incarnation=self.random.randbytes(16),
            layout=LAYOUT,
            pool=PagePool(NUM_PAGES),
            slots=SlotPool(NUM_SLOTS),
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_PROMPT_TOKENS + MAX_OUTPUT_TOKENS,
            max_batch_size=8,
            slot_bytes=LAYOUT.page_bytes,
            hasher=_HASHER,
        )
        worker = SimDecodeWorker(
            process=Process("decode", self.environment, self._observe),
            core=core,
            max_model_len=MAX_PROMPT_TOKENS + MAX_OUTPUT_TOKENS,
            fabric=self.fabric,
            routers=(),
        )
        self._join(worker)
        return worker

    def _join(self, worker: AnyWorker) -> None:
        """A new worker begins its work."""
        self._checks[worker.process] = partial(check_worker, worker)
        session = self._sessions[worker.incarnation] = Session(self.environment, self, worker)
        session.open()
        worker.start()

    def _observe(self, process: Process) -> None:
        self._checks[process]()


def _sampling(handoff: Handoff) -> pb.SamplingParams:
    return pb.SamplingParams(max_tokens=handoff.max_tokens, top_p=1.0)
