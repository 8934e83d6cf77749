"""The check for one GPU: its time limits, verdicts and table; and, tiny, all of it on a CPU."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from gpu_stages.ceilings import Ceilings, ceilings_of
from gpu_stages.items import InapplicableError, Item, run_items
from gpu_stages.journal import (
    Began,
    Ended,
    Failed,
    LeftOut,
    Measured,
    Record,
    Skipped,
    begun,
    decode,
    encode,
    unfinished,
)
from gpu_stages.kernel_times import num_copies
from gpu_stages.measurement import Measurement, above_floor, table, without_time_goal
from gpu_stages.stage_process import StageFiles, run_stage_in_processes
from gpu_stages.stages import (
    RESERVE_S,
    STAGES,
    TOTAL_S,
    Outcome,
    Stage,
    StageRun,
    StageRuns,
    run_stages,
)

PROGRAM = Path(__file__).parents[2] / "bench" / "gpu_check.py"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run_for(
    clock: Clock, seconds: dict[str, float], total_s: float
) -> tuple[StageRuns, list[float]]:
    """Stages that take so long, or what they may; returns also what each was given."""
    given: list[float] = []

    def run(stage: Stage, limit: float) -> Outcome:
        given.append(limit)
        clock.now += min(seconds[stage.name], limit)
        if seconds[stage.name] <= limit:
            return Outcome()
        return Outcome(failures=(Failed(item="slow", reason="took longer"),))

    runs, heard = StageRuns(device="test"), list[StageRun]()
    stages = [Stage(name=name, budget_s=50) for name in seconds]
    run_stages(stages, runs, run=run, clock=clock, on_run=heard.append, total_s=total_s)
    assert heard == runs.runs
    return runs, given


def test_a_late_stage_costs_its_budget_and_the_next_begins() -> None:
    runs, given = run_for(Clock(), {"a": 20, "b": 70, "c": 5}, 600)
    assert given == [50, 50, 50]
    assert [run.passed for run in runs.runs] == [True, False, True]
    assert [run.seconds for run in runs.runs] == [20, 50, 5]
    assert not runs.passed


def test_no_stage_begins_or_ends_behind_the_total() -> None:
    clock = Clock()
    runs, given = run_for(clock, {"a": 50, "b": 70, "c": 5}, 70 + RESERVE_S)
    assert given == [50, 20]
    assert clock.now <= 1070
    assert [each.reason for each in runs.runs[2].outcome.failures] == ["no time was left"]


def test_the_budgets_fit_into_the_total() -> None:
    assert sum(stage.budget_s for stage in STAGES) <= TOTAL_S - RESERVE_S


@pytest.mark.parametrize(("value", "passed"), [(1.2, True), (1.4, False), (float("nan"), False)])
def test_a_figure_passes_within_so_many_times_its_floor(value: float, passed: bool) -> None:
    measured = above_floor("step", value, 1.0, times=1.3)
    assert measured.passed is passed
    assert without_time_goal(measured).passed is None


def test_a_floor_of_nothing_has_no_ratio() -> None:
    assert Measurement(name="a", value=1.0, unit="ms", floor=0.0).ratio is None


def test_floors_follow_from_the_ceilings() -> None:
    ceilings = Ceilings(gb_per_s=3000, tflop_per_s=800)
    assert ceilings.ms_to_move(15e9) == pytest.approx(5.0)  # Llama-3-8B, once
    assert ceilings.ms_to_compute(132e12) == pytest.approx(165.0)  # a prompt of 8k
    with pytest.raises(LookupError):
        ceilings_of([{"name": "copy bandwidth", "value": 1.0}])


def test_the_table_says_what_failed() -> None:
    runs = StageRuns(device="H100")
    for name, outcome in (
        ("times", Outcome(measurements=(above_floor("SwiGLU", 2.0, 1.0, times=1.15),))),
        (
            "model",
            Outcome(
                skipped=(Skipped(item="fp8", reason="too old"),),
                failures=(Failed(item="decode", reason="exit status 1", details="Traceback"),),
            ),
        ),
    ):
        runs.runs.append(StageRun(name=name, seconds=1.0, outcome=outcome))
    text = table(json.loads(json.dumps(runs.result())))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert text.startswith("Device: H100\n")
    assert lines[4] == ["times", "SwiGLU", "2 ms", "1", "2.00", "NO"]
    assert lines[5] == ["model", "fp8: too old", "-", "-", "-", "skipped"]
    assert lines[6] == ["model", "decode: exit status 1", "-", "-", "-", "failed"]


FIGURE = Measurement(name="a", value=1.5, unit="ms")
RECORDS: tuple[Record, ...] = (
    Began(item="a"),
    Measured(measurement=FIGURE),
    Skipped(item="a", reason="no fp8"),
    Failed(item="a", reason="exit status 1", details="two\nlines"),
    LeftOut(item="b"),
    Ended(item="a"),
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_journal_says_what_was_written(record: Record) -> None:
    assert decode(encode(record)) == record


def test_another_line_is_no_record() -> None:
    with pytest.raises(ValueError, match="no journal has such a line"):
        decode('{"record": "Other"}')


def test_a_journal_knows_in_which_item_it_ends() -> None:
    started: list[Record] = [Began(item="a"), Ended(item="a"), Began(item="b")]
    assert unfinished(started) == "b"
    assert begun(started) == {"a", "b"}
    assert unfinished([*started, Failed(item="b", reason="")]) is None


def run_here(
    items: Iterable[Item], clock: Clock, *, passed_over: frozenset[str] = frozenset()
) -> list[Record]:
    """For 100 seconds of a clock that stands still unless an item moves it."""
    records: list[Record] = []
    run_items(
        items,
        records.append,
        begun=passed_over,
        seconds=100,
        clock=clock,
        free=lambda: None,
        log=sys.__stderr__ or sys.stderr,
    )
    return records


def test_items_are_measured_until_the_time_is_over() -> None:
    clock = Clock()

    def measure() -> Iterator[Measurement]:
        clock.now += 60
        yield FIGURE

    items = [Item(name=name, measure=measure) for name in ("a", "b", "c", "d")]
    assert run_here(items, clock, passed_over=frozenset("a")) == [
        Began(item="b"),
        Measured(measurement=FIGURE),
        Ended(item="b"),
        Began(item="c"),
        Measured(measurement=FIGURE),
        Ended(item="c"),
        LeftOut(item="d"),
    ]


def test_what_is_not_for_this_device_is_skipped() -> None:
    def measure() -> Iterator[Measurement]:
        yield FIGURE
        raise InapplicableError("no fp8")

    assert run_here([Item(name="a", measure=measure)], Clock()) == [
        Began(item="a"),
        Measured(measurement=FIGURE),
        Skipped(item="a", reason="no fp8"),
        Ended(item="a"),
    ]


# A stage of items that end well, raise, end their process, or hang, as the first word of each says.
STAGE_PROGRAM = """
import os, sys, time
from pathlib import Path
from gpu_stages.items import Item, run_items
from gpu_stages.journal import begun
from gpu_stages.measurement import Measurement
from gpu_stages.stage_process import StageFiles

def fine():
    yield Measurement(name="a", value=1.5, unit="ms")

def raises():
    raise ValueError("no such GPU")

def dies():
    os.abort()

def hangs():
    time.sleep(1000)

def babbles():
    os.write(2, bytes([0xFF, 0xFE]))
    raise ValueError("no text")

files = StageFiles.of(Path(sys.argv[1]), "stage")
items = [
    Item(name=name, measure=globals()[name.split()[0]], limit_s=1) for name in sys.argv[2:]
]
run_items(
    items, files.write, begun=begun(files.records()), seconds=60, clock=time.monotonic,
    free=lambda: None, log=sys.stderr,
)
"""


def run_program(directory: Path, *items: str, seconds: float = 60) -> Outcome:
    command = [sys.executable, "-c", STAGE_PROGRAM, str(directory), *items]
    return run_stage_in_processes(
        Stage(name="stage", budget_s=60),
        seconds,
        StageFiles.of(directory, "stage"),
        lambda left: command,
    )


@pytest.fixture
def bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROGRAM.parent), prepend=os.pathsep)


def test_an_item_that_fails_costs_itself(bench_path: None, tmp_path: Path) -> None:
    outcome = run_program(tmp_path, "fine", "raises", "dies", "hangs", "fine again")
    assert outcome.measurements == (FIGURE, FIGURE)
    assert [failure.item for failure in outcome.failures] == ["raises", "dies", "hangs"]
    raised, died, hung = outcome.failures
    assert raised.reason == "exit status 1: ValueError: no such GPU"
    assert "Traceback" in raised.details
    assert "exit status -6" in died.reason
    assert "in hangs" in hung.details


def test_what_is_no_text_in_the_log_costs_nothing(bench_path: None, tmp_path: Path) -> None:
    outcome = run_program(tmp_path, "babbles", "fine")
    assert [failure.reason for failure in outcome.failures] == [
        "exit status 1: ValueError: no text"
    ]
    assert outcome.measurements == (FIGURE,)


def test_a_stage_that_cannot_begin_is_not_begun_again(bench_path: None, tmp_path: Path) -> None:
    outcome = run_program(tmp_path, "unknown")
    assert [failure.item for failure in outcome.failures] == ["stage"]
    assert "KeyError: 'unknown'" in outcome.failures[0].reason


def test_a_stage_ends_with_its_time(bench_path: None, tmp_path: Path) -> None:
    outcome = run_program(tmp_path, "hangs", seconds=0.5)
    assert [failure.reason for failure in outcome.failures] == ["the stage took longer than 60 s"]


def test_inputs_are_more_than_the_cache_holds() -> None:
    assert num_copies(62e6, 50 << 20) == 3
    assert num_copies(537e6, 50 << 20) == 1
    assert num_copies(2e3, 50 << 20) == 32
    assert num_copies(1e6, 0) == 1
