"""How long `make serve` takes, once installed, until the first token of the first prompt.

Each run starts the whole product on free ports, waits for the line that it prints after its own
first prompt went through both workers, and stops it. What remains of the time is Ray's share and
the workers'.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
READY = re.compile(r"ready in ([\d.]+) s")
STEP = re.compile(r"^(starting .*|sending .*): ([\d.]+) s$")
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """Seconds of one start."""

    total: float  # from `make` to the line that says ready
    steps: dict[str, float]  # as the server reports them
    stop: float  # from the signal until `make` has ended


def measure() -> WarmStart:
    """Start, wait, stop. Raises RuntimeError when the server does not become ready."""
    start = time.monotonic()
    process = subprocess.Popen(
        ["make", "--no-print-directory", "serve", "ARGS=--port 0 --dashboard-port 0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    steps: dict[str, float] = {}
    total: float | None = None
    for line in process.stdout:
        if step := STEP.match(line.rstrip()):
            steps[step[1]] = float(step[2])
        if READY.search(line):
            total = time.monotonic() - start
            break
        if time.monotonic() - start > TIMEOUT_S:
            break
    stopping = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    process.wait(TIMEOUT_S)
    if total is None:
        raise RuntimeError("the server did not become ready; run `make serve` to see why")
    return WarmStart(total=total, steps=steps, stop=time.monotonic() - stopping)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="one start instead of five")
    arguments = parser.parse_args()
    subprocess.run(["make", "--no-print-directory", "install"], cwd=ROOT, check=True)
    runs = []
    for _ in range(1 if arguments.quick else 5):
        runs.append(measure())
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in runs[-1].steps.items())
        print(f"{runs[-1].total:.1f} s ({steps}); stopped in {runs[-1].stop:.1f} s", flush=True)
    median = statistics.median(run.total for run in runs)
    print(f"median of {len(runs)}: {median:.1f} s from `make serve` to the first token")
    if arguments.json:
        result = {"median_s": median, "runs": [asdict(run) for run in runs]}
        arguments.json.write_text(json.dumps(result | {"python": sys.version}, indent=2))


if __name__ == "__main__":
    main()
