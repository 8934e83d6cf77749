"""One line of what `pagewire doctor` found out."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """WARN is for what makes it slower or needs an option; FAIL for what prevents a start."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's table."""

    subject: str
    status: Status
    detail: str
    remedy: str = ""


def judge(
    subject: str, detail: str, *, sound: bool, remedy: str, otherwise: Status = Status.WARN
) -> Finding:
    """OK without a remedy when it is `sound`, else `otherwise` with it."""
    if sound:
        return Finding(subject=subject, status=Status.OK, detail=detail)
    return Finding(subject=subject, status=otherwise, detail=detail, remedy=remedy)
