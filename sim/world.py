"""A whole cluster under virtual time: routers, workers, clients, and what goes wrong.

One seed gives one run, event for event. Invariants are checked after every event; when the last
fault is over and every request has ended, nothing may be left.
"""

from functools import partial
from random import Random

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.page_pool import PagePool
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import FinishReason, Request
from pagewire.sim.clients import Clients, ClientStream
from pagewire.sim.decode import SimDecodeWorker
from pagewire.sim.environment import Environment
from pagewire.sim.injector import Injector
from pagewire.sim.invariants import AnyWorker, check_router, check_settled, check_worker
from pagewire.sim.kv_memory import LAYOUT
from pagewire.sim.model import VOCAB_SIZE
from pagewire.sim.prefill import SimPrefillWorker
from pagewire.sim.process import Process
from pagewire.sim.router import SimRouter
from pagewire.sim.scenario import Scenario
from pagewire.sim.timeline import Timeline
from pagewire.sim.transport import Fabric
from pagewire.sim.violation import InvariantViolation
from pagewire.sim.workload import Arrival, random_workload

_START_S = 1.0  # until then workers register and nothing else happens
_RECOVERY_S = 15.0  # after the last fault: lost processes are noticed, restarted, registered
_SETTLE_S = 10.0  # after the last deadline: what is left then is a leak


class RouterSlot:
    """One router address: this process now, its successor after a kill."""

    def __init__(self, router: SimRouter) -> None:
        self.process = router

    def router(self) -> SimRouter:
        return self.process


class World:
    """Builds a scenario and runs it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.clients = Clients()
        self._random = Random(scenario.seed)
        self._environment = Environment(
            timeline=Timeline(),
            random=self._random,
            costs=scenario.costs,
            faults=scenario.faults,
        )
        self._fabric = Fabric()
        self._checks = ...
