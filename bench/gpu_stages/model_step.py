"""Stage 3: decode steps and prompts of a whole model, sampling and the host's part included."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from gpu_stages.ceilings import Ceilings
from gpu_stages.items import Item
from gpu_stages.kernels import require_fp8
from gpu_stages.measurement import Measurement, above_floor
from gpu_stages.noise import fill_with_noise
from gpu_stages.random_model import bytes_of_step, random_model, runner_of
from gpu_stages.scale import Scale
from gpu_stages.timing import wall_ms
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels import w4a16, w8a8

DECODE_RATIO, PREFILL_RATIO = 1.30, 1.35
MAX_HOST_GAP_MS = 0.15
GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In which numbers a model is stored."""

    name: str
    numbers: torch.dtype  # of matrices
    kv_dtype: str | None = None  # None: the floats of the scale
    needs_fp8: bool = False


PRECISIONS = (
    Precision(name="fp8, KV too", numbers=w8a8.FP8, kv_dtype="float8_e4m3fn", needs_fp8=True),
    Precision(name="4 bits", numbers=w4a16.DTYPE),
    Precision(name="int8, KV too", numbers=torch.int8, kv_dtype="int8"),
)


def items(scale: Scale, ceilings: Ceilings) -> Iterator[Item]:
    most_pages = max(rows * -(-context // scale.page_size) for rows, context in scale.decode)
    longest = max(scale.prefill)
    model = random_model(scale)
    runner = runner_of(model, scale, max(most_pages, -(-longest // scale.page_size)))
    fill_with_noise(runner.kv_cache.pages)
    runner.warm_up(max(rows for rows, _ in scale.decode))
    for num_rows, context in scale.decode:
        yield Item(
            name=f"decode, {num_rows} rows of {context}",
            measure=partial(_decode, runner, scale, ceilings, num_rows, context),
        )
    for num_tokens in scale.prefill:
        yield Item(
            name=f"prompt of {num_tokens}",
            measure=partial(_prefill, runner, scale, ceilings, num_tokens),
        )
    for precision in PRECISIONS:
        yield Item(name=precision.name, measure=partial(_quantized, precision, scale, ceilings))


def _quantized(precision: Precision, scale: Scale, ceilings: Ceilings) -> Iterator[Measurement]:
    """Decode steps of the same model in fewer bits."""
    if precision.needs_fp8:
        require_fp8(scale)
    num_pages = max(rows * -(-context // scale.page_size) for rows, context in scale.few_decode)
    model = random_model(scale, precision.numbers)
    runner = runner_of(model, scale, num_pages, precision.kv_dtype)
    fill_with_noise(runner.kv_cache.pages)
    runner.warm_up(max(rows for rows, _ in scale.few_decode))
    for num_rows, context in scale.few_decode:
        for measurement in _decode(runner, scale, ceilings, num_rows, context):
            yield replace(measurement, name=f"{precision.name}: {measurement.name}", limit=None)


def _decode(
    runner: ModelRunner, scale: Scale, ceilings: Ceilings, num_rows: int, context: int
) -> Iterator[Measurement]:
    first = _decode_batch(runner, scale, num_rows, context)
    # Each row runs the token that the step before has sampled, as a worker's steps do.
    following = Batch(
        rows=tuple(replace(row, follows=index) for index, row in enumerate(first.rows))
    )
    runner.execute(first)
    kv_bytes = num_rows * context * runner.layout.page_bytes / scale.page_size
    floor = ceilings.ms_to_move(bytes_of_step(runner.model) + kv_bytes)
    name = f"decode, {num_rows} rows of {context}"

    def steps_ahead() -> None:
        step = runner.launch(first)
        for _ in range(scale.repeats - 1):
            launched = runner.launch(following, previous=step)
            step.wait()
            step = launched
        step.wait()

    def steps_of_model() -> None:
        for _ in range(scale.repeats):
            runner.forward(first)

    ahead_ms = wall_ms(steps_ahead, scale.device, 1) / scale.repeats
    yield above_floor(name, ahead_ms, floor, times=DECODE_RATIO)
    step_ms = wall_ms(lambda: runner.execute(first), scale.device, scale.repeats)
    yield Measurement(name=f"{name}, waiting for each", value=step_ms, unit="ms", floor=floor)
    model_ms = wall_ms(steps_of_model, scale.device, 1) / scale.repeats
    # Sampling is in it too, which makes this an upper bound of what the host adds.
    yield Measurement(
        name=f"{name}: sampling and host beside the model",
        value=ahead_ms - model_ms,
        unit="ms",
        limit=MAX_HOST_GAP_MS if num_rows == 1 else None,
    )


def _decode_batch(runner: ModelRunner, scale: Scale, num_rows: int, context: int) -> Batch:
    per_row = -(-context // scale.page_size)
    return Batch(
        rows=tuple(
            BatchRow(
                request_id=str(row),
                token_ids=[row % runner.vocab_size],
                start=context - 1,
                page_table=range(row * per_row, (row + 1) * per_row),
                sampling=GREEDY,
            )
            for row in range(num_rows)
        )
    )


def _prefill(
    runner: ModelRunner, scale: Scale, ceilings: Ceilings, num_tokens: int
) -> Iterator[Measurement]:
    row = BatchRow(
        request_id="",
        token_ids=[token % runner.vocab_size for token in range(num_tokens)],
        start=0,
        page_table=range(-(-num_tokens // scale.page_size)),
        sampling=GREEDY,
    )
    batch = Batch(rows=(row,))
    runner.execute(batch)
    measured = wall_ms(lambda: runner.execute(batch), scale.device, max(1, scale.repeats // 4))
    config = runner.model.config
    head = config.vocab_size * config.hidden_size
    layers = bytes_of_step(runner.model) // runner.model.embedding.itemsize - head
    pairs = num_tokens * (num_tokens + 1) / 2
    attention = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    floor = ceilings.ms_to_compute(2 * layers * num_tokens + 2 * head + attention)
    yield above_floor(f"prompt of {num_tokens}", measured, floor, times=PREFILL_RATIO)
