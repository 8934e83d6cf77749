"""A whole cluster under virtual time, with its clients and with what goes wrong.

One scenario gives one run, event for event. Invariants are checked after every event; when the
last fault is over, every request must end and nothing may be left of any.
"""

from functools import partial
from random import Random

from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import FinishReason, Request
from pagewire.sim.clients import ClientChoice, Clients, ClientStream
from pagewire.sim.cluster import Cluster, RouterDesk
from pagewire.sim.costs import Range
from pagewire.sim.environment import Environment
from pagewire.sim.injector import LONGEST_FAULT_S, Injector
from pagewire.sim.invariants import leftovers
from pagewire.sim.scenario import Scenario
from pagewire.sim.timeline import Timeline
from pagewire.sim.violation import InvariantViolation
from pagewire.sim.workload import Arrival, random_workload

_START_S = 1.0  # until then workers register, undisturbed
_HEAL_S = 3.0  # messages fare badly until so long after the last arrival
_SETTLE_S = 20.0  # after the last deadline: what is left then is left for good
_LOOK_S = 0.5  # between two looks whether all is over


class World:
    """Builds a scenario and runs it to its end."""

    def __init__(self, scenario: Scenario) -> None:
        self.clients = Clients()
        self._scenario = scenario
        self._environment = Environment(
            timeline=Timeline(),
            random=Random(scenario.seed),
            costs=scenario.costs,
            faults=scenario.faults,
        )
        self._cluster = Cluster(scenario, self._environment, self.clients)

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._environment.now

    def run(self) -> None:
        """Run until nothing is left to do.

        Raises InvariantViolation or IntegrityError, with the seed and the events before it.
        """
        try:
            self._run()
        except AssertionError as error:
            error.add_note(self._describe())
            raise

    def _run(self) -> None:
        timeline = self._environment.timeline
        end = _START_S + self._scenario.arrival_s
        self._cluster.start()
        for arrival in random_workload(self._scenario, self._environment.random, _START_S):
            desk = self._environment.random.choice(self._cluster.desks)
            timeline.at(arrival.time, partial(self._arrive, arrival, desk))
        Injector(self._cluster, self._environment).plan(Range(low=_START_S, high=end))
        timeline.at(end + _HEAL_S, self._environment.heal)
        timeline.run_until(end + max(_HEAL_S, LONGEST_FAULT_S))
        self._settle(timeline.now + self._scenario.deadline_s + _SETTLE_S)

    def _arrive(self, arrival: Arrival, desk: RouterDesk) -> None:
        """A client sends its request, and may hang up."""
        router = desk.router()
        self.clients.add(
            ClientStream(
                request_id=arrival.request_id,
                router=router.process.name,
                choices=[_choice(arrival, expected) for expected in arrival.expected],
                opened=self._environment.now,
            )
        )
        if not router.process.is_alive:
            self.clients.on_router_lost(router.process.name)
            return
        router.process.do(partial(router.submit, self._request(arrival)))
        if arrival.hangs_up_after is not None:
            router.process.after(arrival.hangs_up_after, partial(router.cancel, arrival.request_id))
        if arrival.stops_after is not None:
            last = len(arrival.expected) - 1
            stop = partial(router.stop_choice, arrival.request_id, last)
            router.process.after(arrival.stops_after, stop)

    def _request(self, arrival: Arrival) -> Request:
        return Request(
            request_id=arrival.request_id,
            token_ids=arrival.prompt,
            sampling=pb.SamplingParams(
                max_tokens=arrival.sampling.max_tokens,
                top_p=1.0,
                stop_token_ids=arrival.sampling.stop_token_ids,
            ),
            queue_deadline=self._environment.now + self._scenario.queue_deadline_s,
            deadline=self._environment.now + self._scenario.deadline_s,
            n=len(arrival.expected),
        )

    def _settle(self, horizon: float) -> None:
        """Let time pass until all is over, or must have been."""
        timeline = self._environment.timeline
        while left := self._leftovers():
            if timeline.now > horizon:
                raise InvariantViolation("; ".join(left))
            timeline.run_until(timeline.now + _LOOK_S)

    def _leftovers(self) -> list[str]:
        open_streams = [f"{stream.request_id} hangs" for stream in self.clients.open()]
        cluster = self._cluster
        return open_streams or leftovers(cluster.routers, cluster.workers.values())

    def _describe(self) -> str:
        lines = [f"{self._scenario}", f"at {self._environment.now:.4f} s, after:"]
        lines += [f"{time:9.4f}  {who}  {what}" for time, who, what in self._environment.trace]
        return "\n".join(lines)


def _choice(arrival: Arrival, expected: list[int]) -> ClientChoice:
    stopped = expected[-1] in arrival.sampling.stop_token_ids
    reason = FinishReason.STOP if stopped else FinishReason.LENGTH
    return ClientChoice(expected=expected, finish_reason=reason)
