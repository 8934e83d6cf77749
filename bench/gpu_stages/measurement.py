"""One figure of the check, with the least that it could be and the most that it may be. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.table import ABSENT, markdown_table, number

TIME_UNITS = ("ms", "% of time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured."""

    name: str
    value: float
    unit: str
    floor: float | None = None  # what the device's own limits allow, in the same unit
    limit: float | None = None  # above it the check fails

    @property
    def ratio(self) -> float | None:
        return self.value / self.floor if self.floor else None

    @property
    def passed(self) -> bool | None:
        """None: nothing is asked of it. What is not a number fails."""
        return None if self.limit is None else self.value <= self.limit


def without_time_goal(measured: Measurement) -> Measurement:
    """As on a device where times say nothing."""
    return replace(measured, floor=None, limit=None) if measured.unit in TIME_UNITS else measured


def above_floor(
    name: str, value: float, floor: float, *, unit: str = "ms", times: float
) -> Measurement:
    """A figure that may be so many times its floor."""
    return Measurement(name=name, value=value, unit=unit, floor=floor, limit=floor * times)


def table(result: Mapping[str, Any]) -> str:
    """The result of a check, as `StageRuns.result` makes it, as one table in Markdown."""
    rows: list[Sequence[str]] = []
    for stage in result["stages"]:
        measurements = [Measurement(**each) for each in stage["measurements"]]
        rows.extend(_row(stage["name"], each) for each in measurements)
        for verdict, others in (("skipped", stage["skipped"]), ("failed", stage["failures"])):
            for other in others:
                what = f"{other['item']}: {other['reason']}"
                rows.append((stage["name"], what, ABSENT, ABSENT, ABSENT, verdict))
    header = ("stage", "what", "value", "floor", "ratio", "pass")
    return f"Device: {result['device']}\n\n{markdown_table(header, rows)}"


def _row(stage: str, measured: Measurement) -> Sequence[str]:
    return (
        stage,
        measured.name,
        f"{figure(measured.value)} {measured.unit}",
        figure(measured.floor),
        number(measured.ratio, digits=2),
        {None: ABSENT, True: "yes", False: "NO"}[measured.passed],
    )


def figure(value: float | None) -> str:
    """With three digits, whatever its size; a dash where there is none."""
    return ABSENT if value is None else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
