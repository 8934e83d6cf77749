"""Decode and prefill on the same cores: what the number of OpenMP threads does to either.

Two processes run steps of the default model, alone and beside one another: decode steps of 8 rows
with 256 tokens of context, and prefill steps of one prompt. Four ways to share the cores are
compared: one thread each, all threads each with OpenMP's default spinning, the same with short
spinning, and the core board that workers use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from pagewire.cluster.placement import available_cores
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.loading.resolve import resolve_model
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.precision import default_dtype
from pagewire.engine.sampling_params import SamplingParams
from pagewire.worker.core_board import CoreBoard, create_board

ROLES = ("decode", "prefill")
NUM_ROWS, CONTEXT = 8, 256
GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to share the cores. Without `num_threads` it is the core board's."""

    name: str
    num_threads: int | None
    spin_count: int | None  # None: OpenMP's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The steps of one role in one setup, alone or beside the other role."""

    setup: str
    role: str
    is_alone: bool
    num_steps: int
    median_ms: float
    p99_ms: float
    tokens_per_s: float


def make_batch(role: str, prompt_tokens: int) -> Batch:
    """The step that a role repeats; its pages begin at 0."""
    if role == "prefill":
        pages = range(-(-prompt_tokens // 64))
        tokens = [1] * prompt_tokens
        return Batch(rows=(_row(tokens, 0, pages),))
    per_row = CONTEXT // 64
    pages = range(NUM_ROWS * per_row)
    return Batch(
        rows=tuple(
            _row([1], CONTEXT - 1, pages[index * per_row : (index + 1) * per_row])
            for index in range(NUM_ROWS)
        )
    )


def _row(token_ids: list[int], start: int, pages: range) -> BatchRow:
    return BatchRow(
        request_id="bench", token_ids=token_ids, start=start, page_table=pages, sampling=GREEDY
    )


def work(role: str, *, board: Path | None, seconds: float, prompt_tokens: int) -> None:
    """Say when ready; for every line read, run steps and print their times in one line."""
    runner = load_engine(resolve_model(None), dtype=default_dtype("cpu"), num_pages=64)
    batch = make_batch(role, prompt_tokens)
    runner.execute(batch)
    print("ready", flush=True)
    for _ in sys.stdin:
        if board is None:
            times = _steps(seconds, lambda: runner.execute(batch))
        else:
            with CoreBoard(board, slot=ROLES.index(role), num_cores=available_cores()) as view:
                times = _steps(seconds, partial(_shared_step, view, runner, batch))
        print(json.dumps(times), flush=True)


def _shared_step(view: CoreBoard, runner: ModelRunner, batch: Batch) -> None:
    torch.set_num_threads(view.claim())
    runner.execute(batch)


def _steps(seconds: float, step: Callable[[], object]) -> list[float]:
    end = time.perf_counter() + seconds
    times = []
    while (started := time.perf_counter()) < end:
        step()
        times.append(time.perf_counter() - started)
    return times


def measure(setup: Setup, *, seconds: float, prompt_tokens: int) -> list[Run]:
    """Start a process for each role; let them work alone, then at the same time."""
    arguments = [f"--seconds={seconds}", f"--prompt-tokens={prompt_tokens}"]
    environment = dict(os.environ)
    environment.pop("GOMP_SPINCOUNT", None)
    if setup.spin_count is not None:
        environment["GOMP_SPINCOUNT"] = str(setup.spin_count)
    environment["OMP_NUM_THREADS"] = str(setup.num_threads or available_cores())
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        board = Path(directory) / "cores"
        create_board(board, len(ROLES))
        if setup.num_threads is None:
            arguments.append(f"--board={board}")
        processes = {
            role: stack.enter_context(_start(role, arguments, environment)) for role in ROLES
        }
        for process in processes.values():
            _read(process)  # it is ready
        runs = []
        for roles in (("decode",), ("prefill",), ROLES):
            for role in roles:
                _tell(processes[role])
            for role in roles:
                times = json.loads(_read(processes[role]))
                runs.append(_summarise(setup, role, times, len(roles) == 1, prompt_tokens))
        for process in processes.values():
            process.communicate()  # the end of its input ends it
    return runs


def _start(role: str, arguments: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, __file__, f"--role={role}", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def _read(process: "subprocess.Popen[str]") -> str:
    """Its next line. Raises RuntimeError when it has ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker of the benchmark ended with code {process.wait()}")
    return line


def _summarise(
    setup: Setup, role: str, times: list[float], is_alone: bool, prompt_tokens: int
) -> Run:
    ordered = sorted(times)
    tokens = NUM_ROWS if role == "decode" else prompt_tokens
    return Run(
        setup=setup.name,
        role=role,
        is_alone=is_alone,
        num_steps=len(times),
        median_ms=round(1e3 * statistics.median(times), 2),
        p99_ms=round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        tokens_per_s=round(tokens * len(times) / sum(times), 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 second and short prompts")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--board", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seconds, prompt_tokens = arguments.seconds, arguments.prompt_tokens
    if arguments.role is not None:
        work(arguments.role, board=arguments.board, seconds=seconds, prompt_tokens=prompt_tokens)
        return
    if arguments.quick:
        seconds, prompt_tokens = 1.0, 128
    cores = available_cores()
    setups = (
        Setup(name="1 thread each", num_threads=1, spin_count=None),
        Setup(name="all threads each, default spin", num_threads=cores, spin_count=None),
        Setup(name="all threads each, short spin", num_threads=cores, spin_count=5000),
        Setup(name="core board", num_threads=None, spin_count=5000),
    )
    runs = []
    for setup in setups:
        runs += measure(setup, seconds=seconds, prompt_tokens=prompt_tokens)
    for run in runs:
        print(
            f"{run.setup:32} {run.role:8} {'alone' if run.is_alone else 'beside':6} "
            f"{run.median_ms:8.1f} ms (p99 {run.p99_ms:.1f}) {run.tokens_per_s:8.0f} tok/s"
        )
    if arguments.json:
        result = {"cores": cores, "torch": torch.__version__, "runs": [asdict(r) for r in runs]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
