"""Results of a GPU on their way into README, with one that is made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_results import BEGIN, END, README, ResultError, insert, name_of, section

from gpu_stages.journal import Failed
from gpu_stages.measurement import Measurement, above_floor
from gpu_stages.stages import Outcome, StageRun, StageRuns

PROGRAM = Path(__file__).parents[2] / "bench" / "gpu_results.py"


def made_up_result() -> StageRuns:
    runs = StageRuns(
        device="NVIDIA Test 80GB",
        date="2026-01-02T03:04+00:00",
        versions={"torch": "2.11", "triton": "3.6.0", "cuda": "13.0"},
    )
    outcomes = {
        "kernels": Outcome(measurements=(Measurement(name="hidden", value=0.0, unit=""),)),
        "times": Outcome(measurements=(above_floor("SwiGLU", 0.25, 0.2, times=1.15),)),
        "model": Outcome(failures=(Failed(item="decode", reason="exit status 1"),)),
    }
    for name, outcome in outcomes.items():
        runs.runs.append(StageRun(name=name, seconds=1.0, outcome=outcome))
    return runs


def test_the_table_has_figures_and_what_failed() -> None:
    lines = section([made_up_result().result()]).splitlines()
    assert lines[0] == (
        "NVIDIA Test 80GB, 2026-01-02, torch 2.11, triton 3.6.0, cuda 13.0: not all passed."
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert cells == [
        ["SwiGLU", "0.25 ms", "0.2", "1.25", "NO"],
        ["decode", "exit status 1", "-", "-", "failed"],
    ]


def test_a_result_is_kept_and_shown_by_one_command(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    given = tmp_path / "result.json"
    given.write_text(json.dumps(made_up_result().result()))
    command = [sys.executable, str(PROGRAM), "--readme", str(readme), "--results", str(results)]
    subprocess.run([*command, "--add", str(given)], check=True, capture_output=True)
    [kept] = results.iterdir()
    assert kept.name == "gpu_nvidia_test_80gb_2026-01-02.json"
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\nNVIDIA Test 80GB, 2026-01-02")
    assert text.endswith(f"\n\n{END}\nafter\n")
    assert "old" not in text
    kept.unlink()
    subprocess.run(command, check=True, capture_output=True)
    assert readme.read_text() == f"before\n{BEGIN}\n{END}\nafter\n"


def test_a_check_without_a_gpu_is_no_result() -> None:
    with pytest.raises(ResultError, match="the result is of cpu"):
        name_of({"device": "cpu (tiny sizes)", "date": "2026-01-02T03:04"})


def test_readme_has_a_place_for_the_table() -> None:
    readme = README.read_text(encoding="utf-8")
    assert insert(readme, "table").count(BEGIN) == 1
    with pytest.raises(ResultError, match="add both"):
        insert("no marks", "table")
