"""Makes the faults of a scenario strike."""

from collections.abc import Callable

from pagewire.sim.cluster import Cluster
from pagewire.sim.costs import Range
from pagewire.sim.environment import Environment

_RESTART = Range(low=0.2, high=3.0)  # until a killed process has a successor
_STOP = Range(low=0.1, high=8.0)  # short of, and beyond, what a router takes for death
_PAUSE = Range(low=1.0, high=8.0)  # beyond what a prefill worker takes for a stall, too

LONGEST_FAULT_S = max(_RESTART.high, _STOP.high, _PAUSE.high)


class Injector:
    """Draws when each fault strikes, and whom."""

    def __init__(self, cluster: Cluster, environment: Environment) -> None:
        self._cluster = cluster
        self._environment = environment

    def plan(self, during: Range) -> None:
        """Spread the faults of the environment over `during`, in seconds on its timeline."""
        faults = self._environment.faults
        strikes: list[tuple[int, Callable[[], None]]] = [
            (faults.worker_kills, self._kill_worker),
            (faults.router_kills, self._kill_router),
            (faults.worker_stops, self._stop_worker),
            (faults.machine_pauses, self._pause_machine),
            (faults.connection_losses, self._lose_connection),
            (faults.session_losses, self._lose_session),
        ]
        for number, strike in strikes:
            for _ in range(number):
                self._environment.timeline.at(during.draw(self._environment.random), strike)

    def _kill_worker(self) -> None:
        name = self._environment.random.choice(list(self._cluster.workers))
        worker = self._cluster.workers[name]
        if worker.process.is_alive:
            self._environment.note(name, "is killed")
            worker.kill()
            self._later(_RESTART, lambda: self._cluster.restart_worker(name))

    def _kill_router(self) -> None:
        desk = self._environment.random.choice(self._cluster.desks)
        router = desk.router()
        if router.process.is_alive:
            self._environment.note(router.process.name, "is killed")
            router.kill()
            self._later(_RESTART, lambda: self._cluster.restart_router(desk))

    def _stop_worker(self) -> None:
        worker = self._environment.random.choice(list(self._cluster.workers.values()))
        self._environment.note(worker.process.name, "is stopped")
        worker.process.stop()
        self._later(_STOP, worker.process.resume)

    def _pause_machine(self) -> None:
        self._environment.note("machine", "stands still")
        processes = [each.process for each in self._cluster.workers.values()]
        processes += [router.process for router in self._cluster.routers]
        for process in processes:
            process.stop()

        def resume() -> None:
            for process in processes:
                process.resume()

        self._later(_PAUSE, resume)

    def _lose_connection(self) -> None:
        connections = self._cluster.fabric.connections()
        if connections:
            self._environment.note("network", "loses a connection")
            self._environment.random.choice(connections).lose()

    def _lose_session(self) -> None:
        sessions = [
            session
            for worker in self._cluster.workers.values()
            for session in worker.sessions.values()
        ]
        if sessions:
            self._environment.note("network", "loses a session")
            self._environment.random.choice(sessions).lose()

    def _later(self, delay: Range, action: Callable[[], None]) -> None:
        self._environment.timeline.after(delay.draw(self._environment.random), action)
