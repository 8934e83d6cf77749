"""What a decode step costs outside the model: scheduling, inputs, sampling, and the events.

Drives a decode worker's core and the model runner as the worker does, on one thread, with the
default model. The model's time is taken in the very same steps. All times are processor time of
that thread: what other processes do on the machine disturbs them less.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from harness.running_core import running_core
from harness.table import markdown_table, number
from pagewire.decode_worker.core import DecodeCore
from pagewire.engine.batch import Batch, BatchRow, PageCopy
from pagewire.engine.load import load_engine
from pagewire.engine.loading.resolve import resolve_model
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.precision import default_dtype
from pagewire.engine.quantization import Quantization
from pagewire.proto import worker_pb2 as pb
from pagewire.router.tokenizer_loading import load_tokenizer
from pagewire.worker.effects import Emit

TEXT = Path(__file__).parents[1] / "ARCHITECTURE.md"
PROMPT_TOKENS = 256
PAGE_SIZE = 64
BATCH_SIZES = (1, 8, 32)
NUM_PAGES = max(BATCH_SIZES) * 6
WARM_UP = 3  # steps that are not counted

KINDS = {
    "greedy": pb.SamplingParams(top_p=1.0),
    "temperature": pb.SamplingParams(top_p=1.0, temperature=1.0),
    "top-k, top-p": pb.SamplingParams(top_p=0.95, top_k=50, temperature=1.0),
    "top-p": pb.SamplingParams(top_p=0.95, temperature=1.0),
    "penalties": pb.SamplingParams(top_p=1.0, temperature=1.0, frequency_penalty=0.5),
    "5 logprobs": pb.SamplingParams(top_p=1.0, num_logprobs=5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Medians over the steps of one kind and batch size."""

    kind: str
    batch_size: int
    model_ms: float
    scheduling_ms: float  # the core: what runs next, and what became of it
    runner_ms: float  # inputs and sampling
    events_ms: float  # as bytes for the router
    page_faults: float  # memory that the whole step got from the operating system, in pages

    @property
    def outside_ms(self) -> float:
        return self.scheduling_ms + self.runner_ms + self.events_ms

    @property
    def share(self) -> float:
        """Of what the model takes."""
        return self.outside_ms / self.model_ms


class Clock:
    """Seconds spent in what it wraps."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: object) -> Tensor:
        start = time.thread_time()
        result = self._function(*arguments)
        self.seconds = time.thread_time() - start
        return result


def measure(
    runner: ModelRunner, prompt: list[int], kind: str, batch_size: int, num_steps: int
) -> StepCost:
    """Run one kind of sampling at one batch size."""
    sampling = [pb.SamplingParams() for _ in range(batch_size)]
    for index, params in enumerate(sampling):
        params.CopyFrom(KINDS[kind])
        params.seed, params.max_tokens = index, WARM_UP + num_steps + 2
    core = running_core(
        runner.layout,
        num_pages=runner.num_pages,
        vocab_size=runner.vocab_size,
        prompt=prompt,
        sampling=sampling,
    )
    clock = Clock(runner.run)
    with patch.object(runner, "run", clock):
        steps = [run_step(core, runner, clock, prompt) for _ in range(WARM_UP + num_steps)]
    model, scheduling, rest, events, faults = (
        statistics.median(column) for column in zip(*steps[WARM_UP:], strict=True)
    )
    return StepCost(
        kind=kind,
        batch_size=batch_size,
        model_ms=model * 1e3,
        scheduling_ms=scheduling * 1e3,
        runner_ms=rest * 1e3,
        events_ms=events * 1e3,
        page_faults=faults,
    )


def run_step(
    core: DecodeCore, runner: ModelRunner, clock: Clock, prompt: list[int]
) -> tuple[float, float, float, float, int]:
    """Seconds of the model, the core, the rest of the runner and the events; page faults."""
    faults = page_faults()
    times = [time.thread_time()]
    batch, _ = core.next_batch(0.0)
    times.append(time.thread_time())
    assert batch is not None, "the sequences have tokens left"
    if batch.rows[0].output_position == 1:
        fill_pages(runner, batch, prompt)
        times[-1] = time.thread_time()
    result = runner.execute(batch)
    times.append(time.thread_time())
    effects = core.on_batch_done(result, 0.0)
    times.append(time.thread_time())
    emitted = [effect.event for effect in effects if isinstance(effect, Emit)]
    pb.WorkerEvents(events=emitted).SerializeToString()
    times.append(time.thread_time())
    begin, execute, done, events = (after - before for before, after in pairwise(times))
    return clock.seconds, begin + done, execute - clock.seconds, events, page_faults() - faults


def page_faults() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def fill_pages(runner: ModelRunner, batch: Batch, prompt: list[int]) -> None:
    """Compute the prompt's KV for one row, and copy it to the others."""
    first, *others = (list(row.page_table) for row in batch.rows)
    row = BatchRow(request_id="", token_ids=prompt, start=0, page_table=first, sampling=None)
    runner.execute(Batch(rows=(row,)))
    for table in others:
        runner.kv_cache.copy_pages(map(PageCopy, first, table))


def table(costs: list[StepCost]) -> str:
    header = (
        "sampling",
        "batch",
        "model ms",
        "core ms",
        "runner ms",
        "events ms",
        "outside",
        "faults",
    )
    rows = [
        (
            cost.kind,
            str(cost.batch_size),
            number(cost.model_ms),
            number(cost.scheduling_ms, 2),
            number(cost.runner_ms, 2),
            number(cost.events_ms, 2),
            f"{cost.outside_ms:.2f} ms, {cost.share:.1%}",
            number(cost.page_faults, 0),
        )
        for cost in costs
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quantization", type=Quantization, default=Quantization.NONE)
    parser.add_argument("--kernels", default="auto", help="auto, native or torch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = resolve_model(None)
    runner = load_engine(
        path,
        dtype=default_dtype("cpu"),
        quantization=arguments.quantization,
        kernels=arguments.kernels,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
    )
    prompt = list(load_tokenizer(path).encode(TEXT.read_text(encoding="utf-8"))[:PROMPT_TOKENS])
    num_steps = 5 if arguments.quick else 20
    costs = [
        measure(runner, prompt, kind, batch_size, num_steps)
        for batch_size in BATCH_SIZES
        for kind in KINDS
    ]
    print(table(costs))
    if arguments.json:
        values = [asdict(cost) | {"share": cost.share} for cost in costs]
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
