"""Virtual time, and processes that live in it."""

from functools import partial
from random import Random

from pagewire.sim.costs import BALANCED
from pagewire.sim.environment import Environment
from pagewire.sim.faults import NO_FAULTS
from pagewire.sim.process import Process
from pagewire.sim.timeline import Timeline


def make_process(seen: list[str]) -> tuple[Timeline, Process]:
    """A process whose every action is observed by an entry "observed" in `seen`."""
    timeline = Timeline()
    environment = Environment(timeline=timeline, random=Random(0), costs=BALANCED, faults=NO_FAULTS)
    return timeline, Process("process", environment, lambda _: seen.append("observed"))


def test_actions_run_by_time_and_then_in_the_order_of_planning() -> None:
    timeline = Timeline()
    seen: list[tuple[str, float]] = []

    def note(name: str) -> None:
        seen.append((name, timeline.now))

    for name, time in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("later", 3.1)):
        timeline.at(time, partial(note, name))
    timeline.run_until(3.0)
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]
    assert timeline.now == 3.0


def test_the_past_is_now() -> None:
    timeline = Timeline()
    seen: list[float] = []
    timeline.run_until(5.0)
    timeline.at(1.0, lambda: seen.append(timeline.now))
    timeline.run_until(5.0)
    assert seen == [5.0]


def test_what_an_action_plans_runs_too() -> None:
    timeline = Timeline()
    seen: list[float] = []
    timeline.at(1.0, lambda: timeline.after(0.5, lambda: seen.append(timeline.now)))
    timeline.run_until(2.0)
    assert seen == [1.5]


def test_every_action_is_observed() -> None:
    seen: list[str] = []
    timeline, process = make_process(seen)
    process.after(1.0, lambda: seen.append("acted"))
    timeline.run_until(1.0)
    assert seen == ["acted", "observed"]


def test_a_dead_process_does_nothing() -> None:
    seen: list[str] = []
    timeline, process = make_process(seen)
    process.after(1.0, lambda: seen.append("acted"))
    process.kill()
    timeline.run_until(2.0)
    assert seen == []


def test_a_stopped_process_catches_up_in_order() -> None:
    seen: list[str] = []
    timeline, process = make_process(seen)
    process.stop()
    process.after(1.0, lambda: seen.append("first"))
    process.after(2.0, lambda: seen.append("second"))
    timeline.run_until(3.0)
    assert seen == []
    process.resume()
    assert seen == ["first", "observed", "second", "observed"]
