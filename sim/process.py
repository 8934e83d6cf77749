"""A simulated process: it can be killed, and stopped and continued like by SIGSTOP and SIGCONT."""

from collections.abc import Callable

from pagewire.sim.environment import Environment
from pagewire.sim.timeline import Action


class Process:
    """Everything that a process does goes through `do` or `after`.

    `observe` is called with the process after each of its actions.
    """

    def __init__(
        self, name: str, environment: Environment, observe: "Callable[[Process], None]"
    ) -> None:
        self.name = name
        self.environment = environment
        self.is_alive = True
        self._observe = observe
        self._is_stopped = False
        self._held_back: list[Action] = []  # what came while it was stopped

    @property
    def now(self) -> float:
        return self.environment.now

    def do(self, action: Action) -> None:
        """Act now; later if stopped, never if dead."""
        if not self.is_alive:
            return
        if self._is_stopped:
            self._held_back.append(action)
            return
        action()
        self._observe(self)

    def after(self, delay: float, action: Action) -> None:
        """Act `delay` seconds from now."""
        self.environment.timeline.after(delay, lambda: self.do(action))

    def kill(self) -> None:
        """SIGKILL: nothing of it happens any more."""
        self.is_alive = False
        self._held_back.clear()

    def stop(self) -> None:
        """SIGSTOP: what arrives waits."""
        self._is_stopped = True

    def resume(self) -> None:
        """SIGCONT: everything that has waited happens now, in order."""
        self._is_stopped = False
        held_back, self._held_back = self._held_back, []
        for action in held_back:
            self.do(action)
