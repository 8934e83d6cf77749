"""When messages arrive: in order, unless a fault says otherwise."""

from random import Random

from pagewire.sim.channel import Channel
from pagewire.sim.costs import BALANCED
from pagewire.sim.environment import Environment
from pagewire.sim.faults import Faults, MessageFaults
from pagewire.sim.timeline import Timeline


def make_channel(faults: MessageFaults) -> tuple[Environment, Channel]:
    environment = Environment(
        timeline=Timeline(),
        random=Random(1),
        costs=BALANCED,
        faults=Faults(peer_messages=faults),
    )
    return environment, Channel(environment, lambda faults: faults.peer_messages)


def test_messages_arrive_once_and_in_order() -> None:
    _, channel = make_channel(MessageFaults())
    arrivals = [channel.arrivals() for _ in range(200)]
    times = [time for (time,) in arrivals]
    assert times == sorted(times)
    assert all(BALANCED.latency.low <= time <= BALANCED.latency.high for time in times)


def test_a_message_waits_for_the_payload_before_it() -> None:
    _, channel = make_channel(MessageFaults())
    (start,) = channel.arrivals(duration=1.0)
    (after,) = channel.arrivals()
    assert after >= start + 1.0


def test_repetition() -> None:
    _, channel = make_channel(MessageFaults(repeat=1.0))
    assert len(channel.arrivals()) == 2


def test_reordering() -> None:
    _, channel = make_channel(MessageFaults(reorder=0.5))
    times = [time for _ in range(100) for time in channel.arrivals()]
    assert times != sorted(times)


def test_healing_ends_the_faults() -> None:
    environment, channel = make_channel(MessageFaults(repeat=1.0))
    environment.heal()
    assert len(channel.arrivals()) == 1


def test_only_what_can_happen_draws_a_random_number() -> None:
    environment, _ = make_channel(MessageFaults())
    before = environment.random.getstate()
    assert not environment.happens(0.0)
    assert environment.random.getstate() == before
