"""The check for one GPU: its time limits, verdicts and table; and, tiny, all of it on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_stages.ceilings import Ceilings, ceilings_of
from gpu_stages.measurement import Measurement, above_floor, table, without_time_goal
from gpu_stages.stages import STAGES, TOTAL_S, Outcome, Stage, StageRun, StageRuns, run_stages

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
        late = seconds[stage.name] > limit
        return Outcome(measurements=(), error="took longer" if late else None)

    runs, heard = StageRuns(device="test"), list[StageRun]()
    stages = [Stage(name=name, budget_s=50) for name in seconds]
    run_stages(stages, runs, run=run, clock=clock, on_run=heard.append, total_s=total_s)
    assert heard == runs.runs
    return runs, given


def test_a_late_stage_costs_its_budget_and_the_next_begins() -> None:
    runs, given = run_for(Clock(), {"a": 20, "b": 70, "c": 5}, 600)
    assert given == [50, 50, 50]
    assert [run.outcome.error for run in runs.runs] == [None, "took longer", None]
    assert [run.seconds for run in runs.runs] == [20, 50, 5]
    assert not runs.passed


def test_no_stage_begins_or_ends_behind_the_total() -> None:
    clock = Clock()
    runs, given = run_for(clock, {"a": 50, "b": 70, "c": 5}, 80)
    assert given == [50, 20]
    assert clock.now <= 1080
    assert runs.runs[2].outcome.error == "no time was left"


def test_the_budgets_fit_into_the_total() -> None:
    assert sum(stage.budget_s for stage in STAGES) < TOTAL_S


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
        ("model", Outcome(measurements=(), error="took longer than 150 s")),
    ):
        runs.runs.append(StageRun(name=name, seconds=1.0, outcome=outcome))
    text = table(json.loads(json.dumps(runs.result())))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert text.startswith("Device: H100\n")
    assert lines[4] == ["times", "SwiGLU", "2 ms", "1", "2.00", "NO"]
    assert lines[5] == ["model", "took longer than 150 s", "-", "-", "-", "failed"]


@pytest.mark.slow
def test_the_whole_check_runs_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["device"] == "cpu (tiny sizes)"
    assert [stage["name"] for stage in result["stages"]] == [stage.name for stage in STAGES]
    assert all(stage["measurements"] for stage in result["stages"])
    again = subprocess.run(
        [sys.executable, str(PROGRAM), "--table", str(tmp_path / "result.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() in done.stdout
