"""Runs one stage after another within the time that there is, and keeps what they measured. Pure.

A stage that fails or takes too long is noted, and the next begins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_stages.measurement import Measurement

TOTAL_S = 600.0
RESERVE_S = 10.0  # to end in


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the check."""

    name: str
    budget_s: float


STAGES = (
    Stage(name="ceilings", budget_s=30),
    Stage(name="kernels", budget_s=120),
    Stage(name="times", budget_s=120),
    Stage(name="model", budget_s=150),
    Stage(name="handoff", budget_s=90),
    Stage(name="parity", budget_s=60),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a stage measured before it ended, and why it did not end well; None: it did."""

    measurements: tuple[Measurement, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """A stage that was run, or for which no time was left."""

    name: str
    seconds: float
    outcome: Outcome

    @property
    def passed(self) -> bool:
        return self.outcome.error is None and all(
            each.passed is not False for each in self.outcome.measurements
        )


@dataclass(slots=True, kw_only=True)
class StageRuns:
    """The whole check as far as it has come."""

    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    runs: list[StageRun] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(run.passed for run in self.runs)

    def result(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "device": self.device,
            "versions": dict(self.versions),
            "passed": self.passed,
            "stages": [
                {"name": run.name, "seconds": round(run.seconds, 1), **asdict(run.outcome)}
                for run in self.runs
            ],
        }


def run_stages(
    stages: Sequence[Stage],
    runs: StageRuns,
    *,
    run: Callable[[Stage, float], Outcome],
    clock: Callable[[], float],
    on_run: Callable[[StageRun], None],
    total_s: float = TOTAL_S,
) -> None:
    """Run each stage and add it to `runs`; `on_run` hears of each.

    `run` takes a stage and the seconds that it may take: its budget, or what is left of the total.
    """
    end = clock() + total_s - RESERVE_S
    for stage in stages:
        start = clock()
        seconds = min(stage.budget_s, end - start)
        if seconds > 0:
            outcome = run(stage, seconds)
        else:
            outcome = Outcome(measurements=(), error="no time was left")
        stage_run = StageRun(name=stage.name, seconds=clock() - start, outcome=outcome)
        runs.runs.append(stage_run)
        on_run(stage_run)
