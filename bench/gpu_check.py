"""One check for one GPU, within 600 seconds: are the kernels right, and how near to its limits?

Every stage is a process of its own with a time limit, which measures one item after another; one
that fails or hangs costs itself alone. All that is measured is written at once. Needs torch,
triton and transformers, grpcio, protobuf, msgpack and numpy, and of this project the checkout with
PYTHONPATH=src. Without a GPU it runs tiny sizes, with Triton's interpreter, to show that it works.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from gpu_stages.items import Item, run_items
from gpu_stages.journal import Measured, Record, begun
from gpu_stages.measurement import table, without_time_goal
from gpu_stages.stage_process import StageFiles, run_stage_in_processes
from gpu_stages.stages import STAGES, TOTAL_S, Outcome, Stage, StageRun, StageRuns, run_stages

OUT = Path(".bench/gpu_check")
RESULT = "result.json"
PATIENCE = 5.0  # of a check without a GPU, on a machine that others may use as well
BEGIN_SHARE = 0.88  # of a stage's time; in the rest the item ends that has begun
QUERY_S = 15.0  # for what nvidia-smi knows; it hangs where a driver does


def check(directory: Path) -> bool:
    """Run all stages and print the table; returns whether all passed."""
    import torch

    from gpu_stages.scale import choose_scale

    patience = 1.0
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the stages
        patience = PATIENCE
    directory.mkdir(parents=True, exist_ok=True)
    runs = StageRuns(
        device=choose_scale().title,
        date=datetime.now(UTC).isoformat("T", "minutes"),
        versions=versions(),
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # kernels are those of this checkout, and writable
        run_stages(
            [stage.extended(patience) for stage in STAGES],
            runs,
            run=partial(run_in_processes, directory=directory),
            clock=time.monotonic,
            on_run=partial(_keep, directory, runs),
            total_s=patience * TOTAL_S,
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
            with suppress(subprocess.TimeoutExpired):
                found[query] = subprocess.run(
                    command, capture_output=True, text=True, timeout=QUERY_S
                ).stdout.strip()
    return found


def run_in_processes(stage: Stage, seconds: float, *, directory: Path) -> Outcome:
    """What a stage measures in so many seconds."""

    def command(left: float) -> Sequence[str]:
        return (
            *(sys.executable, __file__, "--out", str(directory)),
            *("--stage", stage.name, "--seconds", str(left)),
        )

    return run_stage_in_processes(stage, seconds, StageFiles.of(directory, stage.name), command)


def _keep(directory: Path, runs: StageRuns, run: StageRun) -> None:
    (directory / RESULT).write_text(json.dumps(runs.result(), indent=2) + "\n", encoding="utf-8")
    print(f"{run.name}: {run.seconds:.0f} s, {'passed' if run.passed else 'failed'}", flush=True)
    for failure in run.outcome.failures:
        print(f"{run.name}: {failure.item}: {failure.reason}\n{failure.details}", flush=True)


def run_stage(name: str, directory: Path, seconds: float) -> None:
    """Run what is left of a stage in this process."""
    start = time.monotonic()
    import torch

    on_gpu = torch.cuda.is_available()
    files = StageFiles.of(directory, name)

    def write(record: Record) -> None:
        if isinstance(record, Measured) and not on_gpu:
            record = Measured(measurement=without_time_goal(record.measurement))
        files.write(record)

    def free() -> None:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    run_items(
        _items(name, directory),
        write,
        begun=begun(files.records()),
        seconds=BEGIN_SHARE * seconds - (time.monotonic() - start),
        clock=time.monotonic,
        free=free,
        log=sys.stderr,
        patience=1.0 if on_gpu else PATIENCE,
    )


def _items(name: str, directory: Path) -> Iterable[Item]:
    """The modules of a stage are loaded in its own process, so that none can break another."""
    from gpu_stages.ceilings import ceilings_of
    from gpu_stages.scale import choose_scale

    scale = choose_scale()
    match name:
        case "ceilings":
            from gpu_stages import ceilings

            return ceilings.items(scale)
        case "kernels":
            from gpu_stages import kernels

            return kernels.items(scale)
        case "parity":
            from gpu_stages import parity

            return parity.items(scale)
        case "determinism":
            from gpu_stages import determinism

            return determinism.items(scale)
    first = json.loads((directory / RESULT).read_text(encoding="utf-8"))["stages"][0]
    limits = ceilings_of(first["measurements"])
    match name:
        case "times":
            from gpu_stages import kernel_times

            return kernel_times.items(scale, limits)
        case "model":
            from gpu_stages import model_step

            return model_step.items(scale, limits)
        case "handoff":
            from gpu_stages import handoff

            return handoff.items(scale, limits)
    raise ValueError(f"there is no stage {name!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"write the results into this folder: {OUT}"
    )
    parser.add_argument("--quick", action="store_true", help="all of it, as always")
    parser.add_argument("--table", type=Path, help="print the table of such a result and end")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    if arguments.stage is not None:
        run_stage(arguments.stage, arguments.out, arguments.seconds)
    elif not check(arguments.out):
        sys.exit("the check did not pass")


if __name__ == "__main__":
    main()
