"""What aborts and replays cost a few workers, in figures: the real cores under virtual time."""

from typing import Any

from pagewire.sim.abort_storm import AbortStorm
from pagewire.sim.replays import Replays

_SEED = 1


def measure_safety(*, num_aborts: int, num_recorded: int) -> dict[str, Any]:
    """Give up and play back so many hand-offs. Raises AssertionError when a promise is broken."""
    aborts = AbortStorm(_SEED).run(num_aborts)
    replays = Replays(_SEED).run(num_recorded)
    return {
        "aborts": {
            "given_up": aborts.num_aborted,
            "last_event_before": dict(aborts.heard),
            "others_finished": aborts.num_finished,
            "pages_lost": aborts.pages_lost,
            "slots_lost": aborts.slots_lost,
        },
        "replays": {
            situation: {"messages": number, "accepted": replays.num_accepted[situation]}
            for situation, number in replays.num_replayed.items()
        },
    }


def describe_safety(figures: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    aborts, replays = figures["aborts"], figures["replays"]
    return [
        f"{aborts['given_up']} hand-offs given up at random moments, in either order: "
        f"{aborts['pages_lost']} pages and {aborts['slots_lost']} slots lost, "
        f"{aborts['others_finished']} others finished",
        *(
            f"messages replayed {situation}: {counts['accepted']} of {counts['messages']} accepted"
            for situation, counts in replays.items()
        ),
    ]
