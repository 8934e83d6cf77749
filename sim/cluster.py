"""The processes of a run: routers and workers, started, killed and started again."""

from collections.abc import Callable
from functools import partial

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.page_pool import PagePool
from pagewire.prefill_worker.core import PrefillCore
from pagewire.proto.page_hash import KEY_BYTES, PageHasher
from pagewire.sim.clients import Clients
from pagewire.sim.decode import SimDecodeWorker
from pagewire.sim.environment import Environment
from pagewire.sim.invariants import AnyWorker, check_router, check_worker
from pagewire.sim.kv_memory import LAYOUT
from pagewire.sim.model import VOCAB_SIZE
from pagewire.sim.prefill import SimPrefillWorker
from pagewire.sim.process import Process
from pagewire.sim.router import SimRouter
from pagewire.sim.scenario import Scenario
from pagewire.sim.transport import Fabric

_HASHER = PageHasher(secret=bytes(KEY_BYTES), page_size=LAYOUT.page_size)


class RouterDesk:
    """The address of one router; implements RegistrationDesk."""

    def __init__(self, router: SimRouter) -> None:
        self._router = router

    def router(self) -> SimRouter:
        return self._router

    def replace(self, router: SimRouter) -> None:
        """A successor serves at this address."""
        self._router = router


class Cluster:
    """Makes the processes of a scenario. After each of their actions their invariants hold."""

    def __init__(self, scenario: Scenario, environment: Environment, clients: Clients) -> None:
        self.fabric = Fabric()
        self._scenario = scenario
        self._environment = environment
        self._clients = clients
        self._checks: dict[Process, Callable[[], None]] = {}
        self.desks = [
            RouterDesk(self._make_router(f"router-{index}"))
            for index in range(scenario.num_routers)
        ]
        self.workers: dict[str, AnyWorker] = {}
        for index in range(scenario.num_prefill):
            self.workers[f"prefill-{index}"] = self._make_prefill(f"prefill-{index}")
        for index in range(scenario.num_decode):
            self.workers[f"decode-{index}"] = self._make_decode(f"decode-{index}")

    @property
    def routers(self) -> list[SimRouter]:
        return [desk.router() for desk in self.desks]

    def start(self) -> None:
        for router in self.routers:
            router.start()
        for worker in self.workers.values():
            worker.start()

    def restart_worker(self, name: str) -> None:
        """A new incarnation in the place of a killed one."""
        is_prefill = isinstance(self.workers[name], SimPrefillWorker)
        worker = self._make_prefill(name) if is_prefill else self._make_decode(name)
        self.workers[name] = worker
        worker.start()

    def restart_router(self, desk: RouterDesk) -> None:
        """A new incarnation in the place of a killed one."""
        desk.replace(self._make_router(desk.router().process.name))
        desk.router().start()

    def _process(self, name: str) -> Process:
        return Process(name, self._environment, self._observe)

    def _observe(self, process: Process) -> None:
        self._checks[process]()

    def _make_router(self, name: str) -> SimRouter:
        router = SimRouter(
            process=self._process(name),
            max_queued=self._scenario.max_queued,
            clients=self._clients,
            page_secret=_HASHER.secret,
        )
        self._checks[router.process] = partial(check_router, router)
        return router

    def _make_prefill(self, name: str) -> SimPrefillWorker:
        scenario = self._scenario
        core = PrefillCore(
            incarnation=self._environment.random.randbytes(16),
            layout=LAYOUT,
            pool=PagePool(scenario.prefill_pages),
            vocab_size=VOCAB_SIZE,
            max_model_len=scenario.max_model_len,
            max_batch_tokens=scenario.max_batch_tokens,
            slot_bytes=scenario.slot_bytes,
            hasher=_HASHER,
        )
        worker = SimPrefillWorker(
            process=self._process(name),
            core=core,
            max_model_len=scenario.max_model_len,
            fabric=self.fabric,
            routers=self.desks,
        )
        self._checks[worker.process] = partial(check_worker, worker)
        return worker

    def _make_decode(self, name: str) -> SimDecodeWorker:
        scenario = self._scenario
        core = DecodeCore(
            incarnation=self._environment.random.randbytes(16),
            layout=LAYOUT,
            pool=PagePool(scenario.decode_pages),
            slots=SlotPool(scenario.num_slots),
            vocab_size=VOCAB_SIZE,
            max_model_len=scenario.max_model_len,
            max_batch_size=scenario.max_batch_size,
            slot_bytes=scenario.slot_bytes,
            hasher=_HASHER,
            max_waiting_handoffs=scenario.max_waiting_handoffs,
        )
        worker = SimDecodeWorker(
            process=self._process(name),
            core=core,
            max_model_len=scenario.max_model_len,
            fabric=self.fabric,
            routers=self.desks,
            runs_ahead=scenario.runs_ahead,
        )
        self._checks[worker.process] = partial(check_worker, worker)
        return worker
