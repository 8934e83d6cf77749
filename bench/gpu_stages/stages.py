"""Runs one stage after another within the time that there is, and keeps what they measured. Pure.

A stage that fails or takes too long is noted, and the next begins.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gpu_stages.journal import Failed, LeftOut, Measured, Record, Skipped
from gpu_stages.measurement import Measurement

TOTAL_S = 600.0
RESERVE_S = 30.0  # to begin and to end in
NO_TIME = "no time was left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the check."""

    name: str
    budget_s: float

    def extended(self, times: float) -> "Stage":
        """With so many times the budget."""
        return replace(self, budget_s=times * self.budget_s)


# What is right comes before how fast it is.
STAGES = (
    Stage(name="ceilings", budget_s=40),
    Stage(name="kernels", budget_s=120),
    Stage(name="parity", budget_s=55),
    Stage(name="determinism", budget_s=35),
    Stage(name="times", budget_s=110),
    Stage(name="model", budget_s=130),
    Stage(name="handoff", budget_s=80),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a stage measured, and what it did not."""

    measurements: tuple[Measurement, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    failures: tuple[Failed, ...] = ()

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Outcome":
        """What the journal of a stage says, whose process has ended."""
        measurements, skipped, failures = [], [], []
        for record in records:
            match record:
                case Measured(measurement=measurement):
                    measurements.append(measurement)
                case Skipped():
                    skipped.append(record)
                case Failed():
                    failures.append(record)
                case LeftOut(item=item):
                    failures.append(Failed(item=item, reason=NO_TIME))
        return cls(
            measurements=tuple(measurements), skipped=tuple(skipped), failures=tuple(failures)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """A stage that was run, or for which no time was left."""

    name: str
    seconds: float
    outcome: Outcome

    @property
    def passed(self) -> bool:
        return not self.outcome.failures and all(
            each.passed is not False for each in self.outcome.measurements
        )


@dataclass(slots=True, kw_only=True)
class StageRuns:
    """The whole check as far as it has come."""

    device: str
    date: str = ""  # of its start, as ISO 8601 writes it
    versions: Mapping[str, str] = field(default_factory=dict)
    runs: list[StageRun] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(run.passed for run in self.runs)

    def result(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "device": self.device,
            "date": self.date,
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
            outcome = Outcome(failures=(Failed(item=stage.name, reason=NO_TIME),))
        stage_run = StageRun(name=stage.name, seconds=clock() - start, outcome=outcome)
        runs.runs.append(stage_run)
        on_run(stage_run)
