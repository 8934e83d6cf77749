"""One check for one GPU, within 600 seconds: are the kernels right, and how near to its limits?

Every stage is a process of its own with a time limit, so one that fails or hangs costs itself
alone. What was measured is written after every stage. Needs torch, triton and transformers, and of
this project the checkout with PYTHONPATH=src. Without a GPU it runs tiny sizes, with Triton's
interpreter, to show that it works.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from gpu_stages.measurement import Measurement, table, without_time_goal
from gpu_stages.stages import STAGES, Outcome, Stage, StageRun, StageRuns, run_stages

OUT = Path(".bench/gpu_check")
RESULT = "result.json"
SHOWN_OF_ERROR = 300  # characters


def check(directory: Path) -> bool:
    """Run all stages and print the table; returns whether all passed."""
    import torch

    from gpu_stages.scale import choose_scale

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the stages
    directory.mkdir(parents=True, exist_ok=True)
    runs = StageRuns(device=choose_scale().title, versions=versions())
    run_stages(
        STAGES,
        runs,
        run=partial(run_in_process, directory=directory),
        clock=time.monotonic,
        on_run=partial(_keep, directory, runs),
    )
    print(table(runs.result()))
    return runs.passed


def versions() -> dict[str, str]:
    """Of what the figures depend on; a GPU's clocks and power as they were found."""
    import torch
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        if shutil.which(command[0]):
            found[query] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found


def _keep(directory: Path, runs: StageRuns, run: StageRun) -> None:
    (directory / RESULT).write_text(json.dumps(runs.result(), indent=2) + "\n", encoding="utf-8")
    verdict = "passed" if run.passed else run.outcome.error or "failed"
    print(f"{run.name}: {run.seconds:.0f} s, {verdict}", flush=True)


def run_in_process(stage: Stage, seconds: float, *, directory: Path) -> Outcome:
    """What a process of its own measures in so many seconds."""
    measured = directory / f"{stage.name}.jsonl"
    measured.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(directory), "--stage", stage.name]
    error = None
    with (directory / f"{stage.name}.log").open("w+", encoding="utf-8") as log:
        try:
            status = subprocess.run(command, timeout=seconds, stdout=log, stderr=log).returncode
        except subprocess.TimeoutExpired:
            error = f"took longer than {seconds:.0f} s"
        else:
            if status:
                log.seek(0)
                last = log.read().strip().rpartition("\n")[2]
                error = f"exit status {status}: {last[:SHOWN_OF_ERROR]}"
    lines = measured.read_text(encoding="utf-8").splitlines() if measured.exists() else []
    return Outcome(
        measurements=tuple(Measurement(**json.loads(line)) for line in lines), error=error
    )


def run_stage(name: str, directory: Path) -> None:
    """Run a stage in this process, and write each measurement as soon as there is one."""
    import torch

    with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for measured in _measure(name, directory):
            kept = measured if torch.cuda.is_available() else without_time_goal(measured)
            print(json.dumps(asdict(kept)), file=file, flush=True)


def _measure(name: str, directory: Path) -> Iterator[Measurement]:
    """The modules of a stage are loaded in its own process, so that none can break another."""
    from gpu_stages.ceilings import ceilings_of
    from gpu_stages.scale import choose_scale

    scale = choose_scale()
    match name:
        case "ceilings":
            from gpu_stages import ceilings

            return ceilings.measure(scale)
        case "kernels":
            from gpu_stages import kernels

            return kernels.measure(scale)
        case "parity":
            from gpu_stages import parity

            return parity.measure(scale)
    first = json.loads((directory / RESULT).read_text(encoding="utf-8"))["stages"][0]
    limits = ceilings_of(first["measurements"])
    match name:
        case "times":
            from gpu_stages import kernel_times

            return kernel_times.measure(scale, limits)
        case "model":
            from gpu_stages import model_step

            return model_step.measure(scale, limits)
        case "handoff":
            from gpu_stages import handoff

            return handoff.measure(scale, limits)
    raise ValueError(f"there is no stage {name!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"write the results into this folder: {OUT}"
    )
    parser.add_argument("--quick", action="store_true", help="all of it, as always")
    parser.add_argument("--table", type=Path, help="print the table of such a result and end")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    if arguments.stage is not None:
        run_stage(arguments.stage, arguments.out)
    elif not check(arguments.out):
        sys.exit("the check did not pass")


if __name__ == "__main__":
    main()
